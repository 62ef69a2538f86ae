/* SPDX-License-Identifier: BSD-3-Clause */
// Model of the stamped ring: commit, lease, FULL, and recovery of the dead.
//
// Shared:  block[b]      {state, generation, owner}   the only truth about a block; one CAS or store a change
//          slot[i]       {cycle, generation, block}   one word
//          commit_cursor, lease_cursor                hints that anyone advances
//          slot_waiters                               bitmap of those who wait for a free slot
//          tokens[p]                                  the doorbell of p, a semaphore with one waiter
//
// Processes: producers, killable consumers, one immortal consumer that drains the ring (`drain`), recoverers
// (all but the last killable). Arenas are left out: any producer may claim any free block.
//
// FULL is found after the block became COMMITTED: its owner, who alone can insert it, takes it back to
// CLAIMED, registers, tries again, sleeps. Whoever advances lease_cursor notifies. Recovery never waits:
// what it finds no room for stays COMMITTED by the recoverer, who registers and tries again when woken.
//
// Checked: no message is torn, or delivered twice; leases are in ring order (a lease finds its own position
// in lease_cursor); the fill never exceeds the capacity; at the end every committed message was delivered
// and every block is FREE; such an end stays reachable from everywhere (no stall, no leak, no lost wake-up).
#include "ring_cases.hpp"

namespace {

enum { MAX_BLOCKS = 4, MAX_SLOTS = 4, MAX_PROCESSES = 6, MAX_MESSAGES = 4, MAX_RECOVERERS = 2, NOBODY = 15 };
enum State_ : u8 { FREE, CLAIMED, COMMITTED, LEASED };
struct Block {
    u8 state, generation, owner;
};
struct Slot {
    u8 cycle, generation, block;
};
inline bool operator==(const Block &a, const Block &b) { return !std::memcmp(&a, &b, sizeof a); }
inline bool operator==(const Slot &a, const Slot &b) { return !std::memcmp(&a, &b, sizeof a); }

// P_ producer, I_ insert, L_ lease, C_ consumer, D_ drain, N_ notify_one(slot_waiters), R_ recoverer
#define STEPS(X)                                                                                           \
    X(DEAD) X(DONE) X(P_CLAIM) X(P_FILL) X(P_COMMIT) X(P_UNDO) X(P_DRAIN_DOORBELL) X(P_REGISTER)           \
    X(P_SLEEP) X(P_ABORT) X(P_UNREGISTER) X(ROOM_COMMIT_CURSOR) X(ROOM_LEASE_CURSOR) X(N_LOAD)             \
    X(N_CLEAR) X(N_POST) X(I_COMMIT_CURSOR) X(I_LEASE_CURSOR) X(I_OLDEST_SLOT) X(I_OLDEST_BLOCK)           \
    X(I_HELP_LEASE_CURSOR) X(I_SLOT) X(I_HELP_COMMIT_CURSOR) X(I_SWAP_SLOT) X(I_ADVANCE)                   \
    X(L_LEASE_CURSOR) X(L_SLOT) X(L_EARLY_ADVANCE) X(L_BLOCK) X(L_SWAP_BLOCK) X(L_HELP) X(L_ADVANCE)       \
    X(C_READ) X(C_RELEASE) X(D_CHECK) X(R_IDLE) X(R_SNAPSHOT) X(R_LOAD) X(R_REPAIR) X(R_DISPOSE)           \
    X(R_CLEAR_WAITER) X(R_RING) X(R_DONE) X(R_REGISTER) X(R_UNREGISTER)                                    \
    /* places to return to; never a process's own position */                                              \
    X(P_INSERTED) X(P_NEXT) X(R_INSERTED) X(R_RETRIED)
enum Step : u8 { STEPS(EXPLORE_NAME) };
const char *const STEP_NAME[] = {STEPS(EXPLORE_STRING)};

struct Local {
    u8 at, insert_return, notify_return;
    u8 block, generation;   // of the block in hand
    u8 commit, lease;       // cursors as read
    Slot slot;              // as read
    Block seen;             // as read
    u8 message, count;      // consumer: message read; producer: index of its message; consumer: leases so far
    u8 registered, waiter;   // in slot_waiters; whom notify is about to wake
    u8 final_round;          // drain: everybody had ended before this look at the ring
    u8 victim, i;            // recoverer
    u8 retry, tried;         // recoverer: bitmaps of blocks COMMITTED(me) that found the ring full
};

struct RingState {
    Block block[MAX_BLOCKS];
    u8 payload[MAX_BLOCKS];
    Slot slot[MAX_SLOTS];
    u8 commit_cursor, lease_cursor, slot_waiters, kills, timeouts;
    u8 tokens[MAX_PROCESSES], recovered[MAX_PROCESSES], recoverer[MAX_PROCESSES];
    u8 published[MAX_MESSAGES], delivered[MAX_MESSAGES];
    u8 snapshot[MAX_RECOVERERS][MAX_SLOTS];   // private to a recoverer: generation * MAX_BLOCKS + block
    Local local[MAX_PROCESSES];
};

class RingModel {
    const Config c;
    const int drain, first_recoverer, last;

  public:
    using State = RingState;

    explicit RingModel(const Config &config)
        : c(config), drain(c.producers + c.consumers), first_recoverer(drain + 1),
          last(drain + c.recoverers) {}

    int processes() const { return last + 1; }

    State initial() const {
        State s{};
        s.kills = static_cast<u8>(c.kills);
        s.timeouts = static_cast<u8>(c.timeouts);
        for (int p = 0; p <= last; p++) {
            s.recoverer[p] = NOBODY;
            s.local[p].at = p < c.producers ? P_CLAIM
                            : p < drain     ? L_LEASE_CURSOR
                            : p == drain    ? D_CHECK
                                            : R_IDLE;
        }
        if (c.prefilled) {
            s.block[0] = {COMMITTED, 1, static_cast<u8>(drain)};
            s.slot[0] = {cycle(0), 1, 0};
            s.commit_cursor = 1;
            s.payload[0] = static_cast<u8>(c.producers * c.messages);
            s.published[s.payload[0]] = 1;
        }
        return s;
    }

    bool good(const State &s) const { return s.local[drain].at == DONE; }

    void normalise(State &s) const {
        for (int p = 0; p <= last; p++) {
            Local &l = s.local[p];
            if (l.at != DONE && l.at != DEAD) continue;
            const u8 at = l.at;
            l = Local{};
            l.at = at;
            s.tokens[p] = 0;
            if (p >= first_recoverer) std::memset(s.snapshot[p - first_recoverer], 0, MAX_SLOTS);
        }
    }

    std::string describe(const State &s, int p) const {
        const char *role = p < c.producers ? "producer "
                           : p < drain     ? "consumer "
                           : p == drain    ? "drain "
                                           : "recoverer ";
        return role + std::to_string(p) + " " + STEP_NAME[s.local[p].at];
    }

    bool kill(State &s, int p) const {
        const Local &l = s.local[p];
        if (!s.kills || p == drain || p == last || l.at == DONE || l.at == DEAD) return false;
        if (p >= first_recoverer && s.kills == c.kills) return false;   // nothing to recover from yet
        s.kills--;
        s.local[p].at = DEAD;
        return true;
    }

    bool expire(State &s, int p) const {
        if (!s.timeouts || s.local[p].at != P_SLEEP) return false;
        s.timeouts--;
        s.local[p].at = P_ABORT;
        return true;
    }

    int choices(const State &s, int p) const { return s.local[p].at == N_CLEAR ? last + 2 : 1; }

    bool step(State &s, int p, int choice, const char *&error) const {
        Local &l = s.local[p];
        auto check = [&](bool holds, const char *what) {
            if (!holds) error = what;
        };
        auto go = [&](u8 at) {
            l.at = at;
            return true;
        };
        switch (l.at) {
        case DEAD:
        case DONE:
            return false;

        // ---- producer ---------------------------------------------------------------------------------
        case P_CLAIM: {
            if (l.count == c.messages) return go(DONE);
            int b = 0;
            while (b < c.blocks && s.block[b].state != FREE) b++;
            if (b == c.blocks) return false;
            s.block[b] = {CLAIMED, s.block[b].generation, static_cast<u8>(p)};
            s.payload[b] = NOBODY;
            l.block = static_cast<u8>(b);
            return go(P_FILL);
        }
        case P_FILL:
            s.payload[l.block] = message_of(p, l);
            if (c.bug != SLOT_BEFORE_COMMITTED) return go(P_COMMIT);
            l.generation = static_cast<u8>(s.block[l.block].generation + 1);
            return insert_then(l, P_COMMIT);
        case P_COMMIT: {
            Block &b = s.block[l.block];
            check(b.state == CLAIMED && b.owner == p, "only its owner changes a claimed block");
            b.state = COMMITTED;
            l.generation = ++b.generation;
            s.published[message_of(p, l)] = 1;
            if (c.bug == SLOT_BEFORE_COMMITTED) return next_message(l);
            return insert_then(l, P_INSERTED);
        }
        // The ring is full. Only the owner can insert: nobody has seen the block, so take the commit back.
        case P_UNDO: {
            Block &b = s.block[l.block];
            check((b == Block{COMMITTED, l.generation, static_cast<u8>(p)}),
                  "an uninserted block stays as it is");
            b.state = CLAIMED;
            s.published[message_of(p, l)] = 0;
            l.generation = 0;
            return go(l.registered ? P_SLEEP : P_DRAIN_DOORBELL);
        }
        case P_DRAIN_DOORBELL:
            if (s.tokens[p] == 0) return go(P_REGISTER);
            s.tokens[p]--;
            return true;
        case P_REGISTER:
            s.slot_waiters |= bit(p);
            l.registered = 1;
            return go(P_COMMIT);
        case P_SLEEP:
            if (s.tokens[p] == 0) return false;
            s.tokens[p]--;
            return go(P_DRAIN_DOORBELL);
        case P_ABORT:
            free_block(s, l.block);
            l.block = 0;
            return go(P_UNREGISTER);
        case P_UNREGISTER:
            s.slot_waiters &= static_cast<u8>(~bit(p));
            l.registered = 0;
            l.notify_return = P_NEXT;
            if (c.bug == BATON_DROPPED) return return_from_notify(s, p);
            return go(ROOM_COMMIT_CURSOR);

        // ---- pass the baton on if there is room, or notify after an advance ---------------------------
        case ROOM_COMMIT_CURSOR:
            l.commit = s.commit_cursor;
            return go(ROOM_LEASE_CURSOR);
        case ROOM_LEASE_CURSOR: {
            const bool room = l.commit - s.lease_cursor < c.capacity;
            l.commit = 0;
            return room ? go(N_LOAD) : return_from_notify(s, p);
        }
        case N_LOAD:
            return s.slot_waiters ? go(N_CLEAR) : return_from_notify(s, p);
        case N_CLEAR:   // any waiter may be picked; one that is gone meanwhile means: look again
            if (choice == 0) return go(N_LOAD), s.slot_waiters == 0;
            if (!(s.slot_waiters & bit(choice - 1))) return false;
            s.slot_waiters &= static_cast<u8>(~bit(choice - 1));
            l.waiter = static_cast<u8>(choice - 1);
            return go(N_POST);
        case N_POST:
            post(s, l.waiter);
            l.waiter = 0;
            return return_from_notify(s, p);

        // ---- insert -----------------------------------------------------------------------------------
        case I_COMMIT_CURSOR:
            l.commit = s.commit_cursor;
            return go(I_LEASE_CURSOR);
        case I_LEASE_CURSOR:
            l.lease = s.lease_cursor;
            if (l.commit - l.lease >= c.capacity && c.bug != FULL_UNCHECKED) return go(I_OLDEST_SLOT);
            l.lease = 0;
            return go(I_SLOT);
        case I_OLDEST_SLOT:
            l.slot = s.slot[l.lease % c.slots];
            return l.slot.cycle == cycle(l.lease) ? go(I_OLDEST_BLOCK) : again(l, I_COMMIT_CURSOR);
        case I_OLDEST_BLOCK:
            return is_committed(s.block[l.slot.block], l.slot) ? return_from_insert(s, p, false)
                                                               : go(I_HELP_LEASE_CURSOR);
        case I_HELP_LEASE_CURSOR:
            return advance_lease_cursor(s, p, I_COMMIT_CURSOR, true);
        case I_SLOT:
            l.slot = s.slot[l.commit % c.slots];
            if (l.slot.cycle == cycle(l.commit)) return go(I_HELP_COMMIT_CURSOR);
            return l.slot.cycle + 1 == cycle(l.commit) ? go(I_SWAP_SLOT) : again(l, I_COMMIT_CURSOR);
        case I_HELP_COMMIT_CURSOR:
            if (s.commit_cursor == l.commit) s.commit_cursor++;
            return again(l, I_COMMIT_CURSOR);
        case I_SWAP_SLOT: {
            Slot &slot = s.slot[l.commit % c.slots];
            if (!(slot == l.slot)) return again(l, I_COMMIT_CURSOR);
            check(s.commit_cursor == l.commit, "positions are filled in order");
            check(l.commit + 1 - s.lease_cursor <= c.capacity, "the fill never exceeds the capacity");
            slot = {cycle(l.commit), l.generation, l.block};
            return go(I_ADVANCE);
        }
        case I_ADVANCE:
            if (s.commit_cursor == l.commit) s.commit_cursor++;
            return return_from_insert(s, p, true);

        // ---- lease ------------------------------------------------------------------------------------
        case L_LEASE_CURSOR:
            l.lease = s.lease_cursor;
            return go(L_SLOT);
        case L_SLOT:
            l.slot = s.slot[l.lease % c.slots];
            if (l.slot.cycle == cycle(l.lease))
                return go(c.bug == CURSOR_BEFORE_LEASE ? L_EARLY_ADVANCE : L_BLOCK);
            if (l.slot.cycle + 1 == cycle(l.lease)) return found_empty(s, p, error);
            return again(l, L_LEASE_CURSOR);
        case L_EARLY_ADVANCE:
            if (s.lease_cursor != l.lease) return again(l, L_LEASE_CURSOR);
            s.lease_cursor++;
            l.seen = s.block[l.slot.block];
            return go(L_SWAP_BLOCK);
        case L_BLOCK:
            l.seen = s.block[l.slot.block];
            return go(is_committed(l.seen, l.slot) ? L_SWAP_BLOCK : L_HELP);
        case L_SWAP_BLOCK: {
            Block &b = s.block[l.slot.block];
            if (!(b == l.seen)) return again(l, L_LEASE_CURSOR);
            if (c.bug != CURSOR_BEFORE_LEASE) check(s.lease_cursor == l.lease, "leases are in ring order");
            check(b.state == COMMITTED, "only a committed block is leased");
            b = {LEASED, b.generation, static_cast<u8>(p)};
            l.block = l.slot.block;
            l.generation = b.generation;
            if (c.bug == CURSOR_BEFORE_LEASE) return again(l, C_READ);
            return go(L_ADVANCE);
        }
        case L_HELP:
            return advance_lease_cursor(s, p, L_LEASE_CURSOR, true);
        case L_ADVANCE:
            return advance_lease_cursor(s, p, C_READ, false);

        // ---- consumer ---------------------------------------------------------------------------------
        case C_READ:
            l.message = s.payload[l.block];
            check(l.message < MAX_MESSAGES && s.published[l.message], "no torn message");
            return go(C_RELEASE);
        case C_RELEASE: {
            Block &b = s.block[l.block];
            check((b == Block{LEASED, l.generation, static_cast<u8>(p)}), "a leased block is its holder's");
            check(s.payload[l.block] == l.message, "the payload stays while leased");
            deliver(s, l, check);
            if (p == drain) return go(D_CHECK);
            l.count++;
            return go(l.count == c.leases ? DONE : L_LEASE_CURSOR);
        }
        case D_CHECK:
            l.final_round = everybody_ended(s);
            return go(L_LEASE_CURSOR);

        // ---- recovery ---------------------------------------------------------------------------------
        case R_IDLE: {
            int d = 0;
            while (d <= last && !recoverable(s, d, p)) d++;
            if (d <= last) {
                s.recoverer[d] = static_cast<u8>(p);   // CAS on the life word of d
                l.victim = static_cast<u8>(d);
                l.i = 0;
                const bool reuse = c.bug == STALE_SNAPSHOT && s.snapshot[p - first_recoverer][0];
                return go(reuse ? R_LOAD : R_SNAPSHOT);
            }
            if (!s.tokens[p]) return false;
            s.tokens[p]--;
            return l.retry ? go(R_REGISTER) : true;
        }
        // Once a recovery: what the dead one inserted stays in its slot as long as it is COMMITTED.
        case R_SNAPSHOT: {
            const Slot &slot = s.slot[l.i];
            s.snapshot[p - first_recoverer][l.i] = static_cast<u8>(slot.generation * MAX_BLOCKS + slot.block);
            if (++l.i < c.slots) return true;
            l.i = 0;
            return go(R_LOAD);
        }
        case R_LOAD:
            if (l.i == c.blocks) return go(R_CLEAR_WAITER);
            l.seen = s.block[l.i];
            if (l.seen.state != FREE && l.seen.owner == l.victim) return go(R_REPAIR);
            return next_block(l);
        case R_REPAIR: {
            Block &b = s.block[l.i];
            if (l.seen.state == CLAIMED) {
                check(b == l.seen, "a claimed block of a dead one stays as it is");
                free_block(s, l.i);
                return next_block(l);
            }
            if (l.seen.state == LEASED) {
                check(b == l.seen, "a leased block of a dead one stays as it is");
                l.block = l.i;
                if (c.policy == TAKE) {
                    b.owner = static_cast<u8>(p);
                    l.generation = b.generation;
                    return go(R_DISPOSE);
                }
                b = {COMMITTED, static_cast<u8>(b.generation + 1), static_cast<u8>(p)};
                l.generation = b.generation;
                return insert_then(l, R_INSERTED);
            }
            // COMMITTED: in the ring, or did its owner die before it could insert?
            if (c.bug == ORPHANS_IGNORED || in_snapshot(s, p, l)) return next_block(l);
            if (!(b == l.seen)) return next_block(l);
            if (c.bug == ORPHANS_FREED) {
                free_block(s, l.i);
                return next_block(l);
            }
            b.owner = static_cast<u8>(p);
            l.block = l.i;
            l.generation = b.generation;
            return insert_then(l, R_INSERTED);
        }
        case R_DISPOSE:   // policy TAKE: the recoverer has the lease now and is the one who settles it
            check((s.block[l.block] == Block{LEASED, l.generation, static_cast<u8>(p)}),
                  "the recoverer holds it");
            l.message = s.payload[l.block];
            deliver(s, l, check);
            return next_block(l);
        case R_CLEAR_WAITER:
            s.slot_waiters &= static_cast<u8>(~bit(l.victim));
            l.i = 0;
            return go(c.bug == NO_RING_ALL ? R_DONE : R_RING);
        case R_RING:
            if (has_doorbell(s, l.i) && l.i != p) post(s, l.i);
            do l.i++;
            while (l.i <= last && !(has_doorbell(s, l.i) && l.i != p));
            return l.i <= last ? true : go(R_DONE);
        case R_DONE:
            s.recovered[l.victim] = 1;
            l.victim = l.i = 0;
            if (!l.retry || c.bug == RETRY_ASLEEP) return go(R_IDLE);
            return go(R_REGISTER);
        // The retry list: recovery itself never waits, so what found the ring full is tried again when a slot
        // is free.
        case R_REGISTER:
            s.slot_waiters |= bit(p);
            l.tried = 0;
            return next_retry(s, l);
        case R_UNREGISTER:
            s.slot_waiters &= static_cast<u8>(~bit(p));
            l.notify_return = R_IDLE;
            return go(ROOM_COMMIT_CURSOR);
        }
        return false;
    }

  private:
    static u8 bit(int p) { return static_cast<u8>(1 << p); }
    u8 cycle(int position) const { return static_cast<u8>(position / c.slots + 1); }
    u8 message_of(int p, const Local &l) const { return static_cast<u8>(p * c.messages + l.count); }
    bool can_be_full() const { return c.capacity < c.blocks; }   // otherwise nobody ever waits for a slot

    bool is_committed(const Block &b, const Slot &slot) const {
        return b.state == COMMITTED && (b.generation == slot.generation || c.bug == GENERATION_IGNORED);
    }
    static void free_block(State &s, int b) {
        s.block[b].state = FREE;
        s.block[b].owner = 0;
        s.payload[b] = 0;
    }
    static void post(State &s, int p) {
        s.tokens[p] = 1;   // a binary semaphore: who has been rung for already looks again once
    }
    bool has_doorbell(const State &s, int p) const {
        return can_be_full() && (p < c.producers || p >= first_recoverer) && s.local[p].at != DONE &&
               s.local[p].at != DEAD;
    }
    template <class Check> static void deliver(State &s, Local &l, Check check) {
        s.delivered[l.message]++;
        check(s.delivered[l.message] == 1, "a message is delivered once");
        free_block(s, l.block);
        l.block = l.generation = l.message = 0;
    }

    // Forget what was read, so that states that differ in dead values only are one state.
    static bool again(Local &l, u8 at) {
        l.commit = l.lease = 0;
        l.slot = {};
        l.seen = {};
        l.at = at;
        return true;
    }
    static bool insert_then(Local &l, u8 where) {
        l.insert_return = where;
        return again(l, I_COMMIT_CURSOR);
    }
    bool return_from_insert(State &s, int p, bool inserted) const {
        Local &l = s.local[p];
        const u8 where = l.insert_return;
        l.insert_return = 0;
        again(l, where);
        switch (where) {
        case P_COMMIT:   // SLOT_BEFORE_COMMITTED
            l.generation = 0;
            return true;
        case P_INSERTED:
            l.at = inserted ? P_UNREGISTER : P_UNDO;
            return inserted && !l.registered ? next_message(l) : true;
        case R_INSERTED:
            if (!inserted && c.bug != RETRY_FORGOTTEN) l.retry |= bit(l.block);
            return next_block(l);
        default:   // R_RETRIED
            if (inserted) l.retry &= static_cast<u8>(~bit(l.block));
            return next_retry(s, l);
        }
    }
    bool advance_lease_cursor(State &s, int p, u8 then, bool helping) const {
        Local &l = s.local[p];
        const bool advanced = s.lease_cursor == l.lease;
        if (advanced) s.lease_cursor++;
        again(l, then);
        if (!advanced || !can_be_full() || c.bug == ADVANCE_SILENT || (helping && c.bug == HELPER_SILENT))
            return true;
        l.notify_return = then;
        l.at = N_LOAD;
        return true;
    }
    bool return_from_notify(State &s, int p) const {
        Local &l = s.local[p];
        const u8 where = l.notify_return;
        l.notify_return = 0;
        l.at = where;
        return where == P_NEXT ? next_message(l) : true;
    }
    static bool next_message(Local &l) {
        l.count++;
        l.block = l.generation = 0;
        l.at = P_CLAIM;
        return true;
    }
    static bool next_block(Local &l) {
        l.i++;
        l.block = l.generation = 0;
        l.seen = {};
        l.at = R_LOAD;
        return true;
    }
    bool next_retry(const State &s, Local &l) const {
        l.block = l.generation = 0;
        for (u8 b = 0; b < c.blocks; b++) {
            if (!(l.retry & bit(b)) || (l.tried & bit(b))) continue;
            l.tried |= bit(b);
            l.block = b;
            l.generation = s.block[b].generation;
            return insert_then(l, R_RETRIED);
        }
        l.tried = 0;
        l.at = l.retry ? R_IDLE : R_UNREGISTER;
        return true;
    }
    bool in_snapshot(const State &s, int p, const Local &l) const {
        for (int i = 0; i < c.slots; i++)
            if (s.snapshot[p - first_recoverer][i] == l.seen.generation * MAX_BLOCKS + l.i) return true;
        return false;
    }

    bool found_empty(State &s, int p, const char *&error) const {
        Local &l = s.local[p];
        again(l, p == drain ? D_CHECK : DONE);
        if (p != drain || !l.final_round) return true;
        l.at = DONE;
        for (int b = 0; b < c.blocks; b++)
            if (s.block[b].state != FREE) error = "at the end every block is FREE";
        for (int m = 0; m < c.producers * c.messages + c.prefilled; m++)
            if (s.delivered[m] != s.published[m]) error = "at the end every message was delivered";
        return true;
    }

    static bool dead(const State &s, int p) { return s.local[p].at == DEAD; }
    bool recoverable(const State &s, int d, int me) const {
        return d != me && dead(s, d) && !s.recovered[d] &&
               (s.recoverer[d] == NOBODY || dead(s, s.recoverer[d]));
    }
    bool everybody_ended(const State &s) const {
        for (int p = 0; p <= last; p++) {
            if (p == drain) continue;
            if (dead(s, p) ? !s.recovered[p] : p < drain ? s.local[p].at != DONE : s.local[p].retry != 0)
                return false;
        }
        return true;
    }
};

}   // namespace

int main(int argc, char **argv) { return explore::main_of<RingModel>("ring", cases(), argc, argv); }
