/* SPDX-License-Identifier: BSD-3-Clause */
// Model of blocks sent by reference: a SHARED block and its bitmap of holders.
//
// Shared:  target          {state, generation}     the block that is sent by reference
//          holders[2]      words of the bitmap, one bit a participant (participant p: word p % 2)
//          version         bumped after each setting of a holder bit, before what protected it so far may go
//          frame[f]        {state, owner, names}   a frame with a reference to that generation of the target
//          arena_owner[p]  who owns the arena that p had at first
// Private: references      views, and own frames not yet found FREE; the holder bit stands while it is not 0
//
// Processes: the allocator (0) shares the target, sends frames that name it, drops its view; receivers take
// a frame, set their bit, settle the frame, use the view, perhaps forward the reference (in the same frame
// or in one of their own), drop the view; recoverers, of which the last is immortal and also receives, so
// that every frame is consumed in the end. The ring is abstracted: one step leases any committed frame of
// another's.
//
// Invariant behind recovery: the owner of the arena in which a frame in flight lies holds what the frame
// names. So a recoverer (1) sets its own bits for those frames, (2) takes the arenas over, (3) clears the
// dead one's bits in every record, whatever its state, (4) sweeps. Recoveries may run at once, in any order,
// but a place in the table is given away again only when no recovery begun from it is unfinished.
//
// Checked: the target is never freed while a live view or a frame in flight names it; nobody finds it gone;
// it is freed once a generation, and that stays reachable from everywhere (no leak), although nobody sweeps
// but releasers and recoverers.
#include "explore.hpp"

namespace {

enum { MAX_FRAMES = 4, MAX_PROCESSES = 6, WORDS = 2, NOBODY = 15, ALLOCATOR = 0 };
enum State_ : u8 { FREE, CLAIMED, COMMITTED, LEASED, SHARED };
enum Bug {
    NO_BUG,
    SINGLE_COLLECT,         // the sweep reads the words once and ignores the version
    DOUBLE_COLLECT,         // the sweep reads the words twice and ignores the version
    VERSION_FIRST,          // a receiver bumps the version before it sets its bit
    VERSION_LATE,           // a receiver bumps the version after it settled the frame
    SETTLED_FIRST,          // a receiver settles the frame before it sets its bit
    STATE_READ_LAST,        // the sweep reads the generation it will free after it collected the words
    FRAME_NOT_HELD,         // the allocator drops its bit once the frame is committed
    REPLY_ADDS_REFERENCE,   // a reply in place, in another's frame, names what the frame did not name before
    FRAMES_NOT_ADOPTED,     // recovery leaves out (1)
    CLEARED_FIRST,          // recovery goes (3) (1) (2)
    CLEARED_BEFORE_ARENA,   // recovery goes (1) (3) (2)
    ARENA_FIRST,            // recovery goes (2) (1) (3)
    PLACE_REUSED,         // a dead recoverer's place is given away: its unfinished recoveries look alive
    CLEARED_UNLESS_FREE,    // recovery leaves the records that are FREE alone
    NO_SWEEP_AT_RECOVERY,
    NO_SWEEP_AT_RELEASE,
};

struct Config {
    int receivers = 1;
    int rounds = 1, frames = 1;   // lives of the target, and frames the allocator sends in each
    int forwards = 0;             // how often receivers may forward the reference, in total
    int recoverers = 1, kills = 0;
    int task = 0;   // 1: receiver 1 has leased one more frame of the allocator's, without references
    int allocator_sweeps = 0;   // 1: the allocator sweeps, too, while it waits for the target to become FREE
    Bug bug = NO_BUG;
};

#define STEPS(X)                                                                                           \
    X(DEAD) X(DONE) X(A_CLAIM) X(A_SET_BIT) X(A_SHARE) X(A_CLAIM_FRAME) X(A_COMMIT_FRAME) X(A_DROP)        \
    X(A_WAIT) X(B_LEASE) X(B_SET_BIT) X(B_BUMP) X(B_SETTLE) X(B_USE) X(B_CLAIM_FRAME) X(B_COMMIT_FRAME)    \
    X(B_DROP) X(CLEAR_BIT) X(S_STATE) X(S_VERSION) X(S_WORD) X(S_VERSION_AGAIN) X(S_LATE_STATE)            \
    X(S_FREE) X(R_IDLE) X(R_FRAME) X(R_SET_BIT) X(R_BUMP) X(R_CLEAR) X(R_TARGET) X(R_ADOPT) X(R_DONE)
enum Step : u8 { STEPS(EXPLORE_NAME) };
const char *const STEP_NAME[] = {STEPS(EXPLORE_STRING)};

struct Frame {
    u8 state, owner, names;
};
struct Local {
    u8 at, sweep_return;
    u8 frame, generation;   // frame in hand; life of the target that we hold
    u8 view, references;    // private: a view is alive; views + own frames not yet found FREE
    u8 own;                 // bitmap of those frames (sent by us or adopted)
    u8 round;
    u8 seen_generation, seen_version, i;
    u8 victim, homes;   // recovery: the dead one, bitmap of its arenas
};
struct HolderState {
    u8 target_state, target_generation, target_owner, version, frees, forwards, kills;
    u8 holders[WORDS];
    Frame frame[MAX_FRAMES];
    u8 arena_owner[MAX_PROCESSES], recovered[MAX_PROCESSES], recoverer[MAX_PROCESSES];
    Local local[MAX_PROCESSES];
};

class HolderModel {
    const Config c;
    const int first_recoverer, last, frames;

  public:
    using State = HolderState;

    // Frames 0 .. c.frames-1 lie in the allocator's arena, then one in that of each receiver, then the task.
    explicit HolderModel(const Config &config)
        : c(config), first_recoverer(1 + c.receivers), last(c.receivers + c.recoverers),
          frames(c.frames + c.receivers + c.task) {}

    int processes() const { return last + 1; }

    State initial() const {
        State s{};
        s.kills = static_cast<u8>(c.kills);
        s.forwards = static_cast<u8>(c.forwards);
        if (c.task) s.frame[frames - 1] = {LEASED, 1, 0};
        for (int p = 0; p <= last; p++) {
            s.arena_owner[p] = static_cast<u8>(p);
            s.recoverer[p] = NOBODY;
            s.local[p].at = p == ALLOCATOR ? A_CLAIM : p < first_recoverer ? B_LEASE : R_IDLE;
        }
        return s;
    }

    bool good(const State &s) const {
        for (int p = 0; p <= last; p++)
            if (dead(s, p) && !s.recovered[p]) return false;
        for (int f = 0; f < frames; f++)
            if (s.frame[f].state != FREE) return false;
        return (dead(s, ALLOCATOR) || s.local[ALLOCATOR].at == DONE) && s.target_state == FREE &&
               !s.holders[0] && !s.holders[1];
    }

    void normalise(State &s) const {
        for (int p = 0; p <= last; p++) {
            Local &l = s.local[p];
            if (l.at != DONE && l.at != DEAD) continue;
            const u8 at = l.at;
            l = Local{};
            l.at = at;
        }
    }

    std::string describe(const State &s, int p) const {
        const char *role = p == ALLOCATOR ? "allocator " : p < first_recoverer ? "receiver " : "recoverer ";
        return role + std::to_string(p) + " " + STEP_NAME[s.local[p].at];
    }

    bool kill(State &s, int p) const {
        const Local &l = s.local[p];
        if (!s.kills || p == last || l.at == DEAD || l.at == DONE) return false;
        if (p >= first_recoverer && s.kills == c.kills) return false;   // nothing to recover from yet
        s.kills--;
        s.local[p].at = DEAD;
        return true;
    }

    bool expire(State &, int) const { return false; }

    // Waiting places offer several continuations: each frame to lease or to find FREE, each victim.
    int choices(const State &s, int p) const {
        switch (s.local[p].at) {
        case A_CLAIM:
            return 2;
        case B_USE:
            return 3;
        case A_WAIT:
            return frames;
        case B_LEASE:
            return 2 * frames + 1;
        case B_SETTLE:
            return 2;
        case R_IDLE:
            return 2 * frames + last + 1;
        default:
            return 1;
        }
    }

    bool step(State &s, int p, int choice, const char *&error) const {
        Local &l = s.local[p];
        auto check = [&](bool holds, const char *what) {
            if (!holds) error = what;
        };
        auto go = [&](u8 at) {
            l.at = at;
            return true;
        };
        auto check_alive = [&](int generation) {
            check(s.target_state == SHARED && s.target_generation == generation, "no use after free");
        };
        switch (l.at) {
        case DEAD:
        case DONE:
            return false;

        // ---- allocator --------------------------------------------------------------------------------
        case A_CLAIM:
            if (l.round == c.rounds) return choice == 0 && go(DONE);
            if (choice == 1) return c.allocator_sweeps && s.target_state == SHARED && sweep_then(l, A_CLAIM);
            if (s.target_state != FREE) return false;
            for (int q = 0; q <= last;
                 q++)   // one who died between bit and version may have left a bit, for recovery
                check(dead(s, q) || !(s.holders[word(q)] & bit(q)), "a FREE block has no live holders");
            s.target_state = CLAIMED;
            s.target_owner = ALLOCATOR;
            l.generation = ++s.target_generation;
            l.round++;
            return go(A_SET_BIT);
        case A_SET_BIT:
            s.holders[word(p)] |= bit(p);
            return go(A_SHARE);
        case A_SHARE:
            s.target_state = SHARED;
            l.view = l.references = 1;
            l.frame = 0;
            return go(A_CLAIM_FRAME);
        case A_CLAIM_FRAME:
            check(s.frame[l.frame].state == FREE, "all frames of the last round are free");
            s.frame[l.frame] = {CLAIMED, ALLOCATOR, l.generation};
            if (c.bug != FRAME_NOT_HELD) {
                l.references++;
                l.own |= fbit(l.frame);
            }
            return go(A_COMMIT_FRAME);
        case A_COMMIT_FRAME:
            s.frame[l.frame].state = COMMITTED;
            return go(++l.frame < c.frames ? A_CLAIM_FRAME : A_DROP);
        case A_DROP:   // private
            l.view = l.frame = 0;
            return drop_reference(l, A_WAIT, A_CLAIM);
        case A_WAIT:
            return own_frame_free(s, l, choice) && drop_reference(l, A_WAIT, A_CLAIM);

        // ---- receiver ---------------------------------------------------------------------------------
        case B_LEASE:
            if (choice == 2 * frames) return settle_task(s, p);
            return choice < frames ? lease(s, p, choice)
                                   : found_own_frame_free(s, l, choice - frames, B_LEASE);
        case B_SET_BIT:
            check_alive(l.generation);
            s.holders[word(p)] |= bit(p);
            return go(c.bug == VERSION_FIRST || c.bug == VERSION_LATE ? B_SETTLE : B_BUMP);
        case B_BUMP:
            s.version++;
            return go(c.bug == VERSION_FIRST                            ? B_SET_BIT
                      : c.bug == VERSION_LATE || c.bug == SETTLED_FIRST ? B_USE
                                                                        : B_SETTLE);
        case B_SETTLE:
            check(s.frame[l.frame].state == LEASED && s.frame[l.frame].owner == p,
                  "a leased frame is its holder's");
            if (choice == 1) {   // forward in place: the frame stays alive, and its allocator's bit with it
                if (!s.forwards || c.bug == SETTLED_FIRST) return false;
                s.forwards--;
                s.frame[l.frame].state = COMMITTED;
            } else {
                s.frame[l.frame] = Frame{};
            }
            l.frame = 0;
            l.view = 1;
            return go(c.bug == SETTLED_FIRST ? B_SET_BIT : c.bug == VERSION_LATE ? B_BUMP : B_USE);
        case B_USE: {
            check_alive(l.generation);
            const int mine = c.frames + p - 1;
            if (choice == 0) return go(B_DROP);
            if (choice == 2) {   // reply to the task in place: carries no reference, unless that is the bug
                if (!settle_task(s, p)) return false;
                if (c.bug == REPLY_ADDS_REFERENCE) s.frame[frames - 1] = {COMMITTED, 1, l.generation};
                return go(B_DROP);
            }
            if (p >= first_recoverer || !s.forwards || s.frame[mine].state != FREE || l.own & fbit(mine))
                return false;
            s.forwards--;
            l.frame = static_cast<u8>(mine);
            return go(B_CLAIM_FRAME);
        }
        case B_CLAIM_FRAME:
            s.frame[l.frame] = {CLAIMED, static_cast<u8>(p), l.generation};
            l.references++;
            l.own |= fbit(l.frame);
            return go(B_COMMIT_FRAME);
        case B_COMMIT_FRAME:
            s.frame[l.frame].state = COMMITTED;
            l.frame = 0;
            return go(B_DROP);
        case B_DROP:   // private
            l.view = 0;
            return drop_reference(l, idle(p), idle(p));

        // ---- the last reference of a process is gone: clear the bit, then sweep -----------------------
        case CLEAR_BIT:
            s.holders[word(p)] &= static_cast<u8>(~bit(p));
            l.generation = 0;
            if (c.bug == NO_SWEEP_AT_RELEASE) return return_from_sweep(l);
            return go(c.bug == STATE_READ_LAST ? S_VERSION : S_STATE);
        case S_STATE:
            if (s.target_state != SHARED) return return_from_sweep(l);
            l.seen_generation = s.target_generation;
            l.i = 0;
            return go(c.bug == SINGLE_COLLECT || c.bug == DOUBLE_COLLECT ? S_WORD : S_VERSION);
        case S_VERSION:
            l.seen_version = s.version;
            l.i = 0;
            return go(S_WORD);
        case S_WORD:
            if (s.holders[l.i % WORDS]) return return_from_sweep(l);
            if (++l.i < (c.bug == DOUBLE_COLLECT ? 2 * WORDS : WORDS)) return true;
            return go(c.bug == SINGLE_COLLECT || c.bug == DOUBLE_COLLECT ? S_FREE : S_VERSION_AGAIN);
        case S_VERSION_AGAIN:   // changed: somebody set a bit meanwhile, and sweeps when he clears it
            if (s.version != l.seen_version) return return_from_sweep(l);
            return go(c.bug == STATE_READ_LAST ? S_LATE_STATE : S_FREE);
        case S_LATE_STATE:
            if (s.target_state != SHARED) return return_from_sweep(l);
            l.seen_generation = s.target_generation;
            return go(S_FREE);
        case S_FREE:
            if (s.target_state == SHARED && s.target_generation == l.seen_generation) {
                for (int q = 0; q <= last; q++)
                    check(dead(s, q) || !s.local[q].view, "no free under a live view");
                for (int f = 0; f < frames; f++)
                    check(!in_flight(s.frame[f]) || s.frame[f].names != s.target_generation,
                          "no free under a frame in flight");
                s.target_state = FREE;
                check(++s.frees == s.target_generation, "freed once a generation");
            }
            return return_from_sweep(l);

        // ---- recovery ---------------------------------------------------------------------------------
        case R_IDLE:
            if (choice < frames) return p == last && lease(s, p, choice);
            if (choice < 2 * frames) return found_own_frame_free(s, l, choice - frames, R_IDLE);
            if (!recoverable(s, choice - 2 * frames, p)) return false;
            l.victim = static_cast<u8>(choice - 2 * frames);
            s.recoverer[l.victim] = static_cast<u8>(p);   // CAS on the life word of the victim
            for (int q = 0; q <= last; q++)
                if (s.arena_owner[q] == l.victim) l.homes |= static_cast<u8>(1 << q);
            return after(l, R_IDLE);
        case R_FRAME: {
            if (l.i == frames) {
                l.i = 0;
                return after(l, R_FRAME);
            }
            Frame &f = s.frame[l.i];
            const bool adopted = l.homes >> home(l.i) & 1;
            if (f.state == CLAIMED && f.owner == l.victim) f = Frame{};
            if (f.state == LEASED && f.owner == l.victim)
                f = {COMMITTED, static_cast<u8>(p), f.names};   // redispatch
            if (in_flight(f) && adopted && c.bug != FRAMES_NOT_ADOPTED) {
                l.generation = f.names;
                l.own |= fbit(l.i);
                if (l.references++ == 0) return go(R_SET_BIT);
            }
            l.i++;
            return true;
        }
        case R_SET_BIT:
            check_alive(l.generation);
            s.holders[word(p)] |= bit(p);
            return go(R_BUMP);
        case R_BUMP:
            s.version++;
            l.i++;
            return go(R_FRAME);
        case R_ADOPT:   // one store an arena
            for (int q = 0; q <= last; q++) {
                if (s.arena_owner[q] != l.victim) continue;
                s.arena_owner[q] = static_cast<u8>(p);
                return true;
            }
            return after(l, R_ADOPT);
        case R_CLEAR:
            if (s.target_state != FREE || c.bug != CLEARED_UNLESS_FREE)
                s.holders[word(l.victim)] &= static_cast<u8>(~bit(l.victim));
            return after(l, R_CLEAR);
        case R_TARGET:
            if (s.target_state == CLAIMED && s.target_owner == l.victim) {
                s.target_state = FREE;
                s.frees++;
            } else if (s.target_state == SHARED && c.bug != NO_SWEEP_AT_RECOVERY) {
                return sweep_then(l, R_DONE);
            }
            return go(R_DONE);
        case R_DONE:
            s.recovered[l.victim] = 1;
            l.victim = l.homes = 0;
            return go(R_IDLE);
        }
        return false;
    }

  private:
    static int word(int p) { return p % WORDS; }
    static u8 bit(int p) { return static_cast<u8>(1 << p / WORDS); }
    static u8 fbit(int f) { return static_cast<u8>(1 << f); }
    int home(int f) const {
        return f < c.frames || f >= c.frames + c.receivers ? ALLOCATOR : f - c.frames + 1;
    }
    u8 idle(int p) const { return p < first_recoverer ? B_LEASE : R_IDLE; }
    static bool in_flight(const Frame &f) { return f.state == COMMITTED || f.state == LEASED; }
    static bool dead(const State &s, int p) { return s.local[p].at == DEAD; }

    bool recoverable(const State &s, int d, int me) const {
        if (d == me || !dead(s, d) || s.recovered[d]) return false;
        if (s.recoverer[d] == NOBODY) return true;
        return dead(s, s.recoverer[d]) && !(c.bug == PLACE_REUSED && s.recovered[s.recoverer[d]]);
    }
    bool after(Local &l, u8 phase) const {   // the phases of recovery in their order
        static const u8 RIGHT[] = {R_IDLE, R_FRAME, R_ADOPT, R_CLEAR, R_TARGET};
        static const u8 CLEAR_FRAME_ADOPT[] = {R_IDLE, R_CLEAR, R_FRAME, R_ADOPT, R_TARGET};
        static const u8 FRAME_CLEAR_ADOPT[] = {R_IDLE, R_FRAME, R_CLEAR, R_ADOPT, R_TARGET};
        static const u8 ADOPT_FRAME_CLEAR[] = {R_IDLE, R_ADOPT, R_FRAME, R_CLEAR, R_TARGET};
        const u8 *order = c.bug == CLEARED_FIRST          ? CLEAR_FRAME_ADOPT
                          : c.bug == CLEARED_BEFORE_ARENA ? FRAME_CLEAR_ADOPT
                          : c.bug == ARENA_FIRST          ? ADOPT_FRAME_CLEAR
                                                          : RIGHT;
        while (*order != phase) order++;
        l.at = order[1];
        return true;
    }

    bool lease(State &s, int p, int f) const {
        Local &l = s.local[p];
        if (s.frame[f].state != COMMITTED || home(f) == p) return false;
        s.frame[f].state = LEASED;
        s.frame[f].owner = static_cast<u8>(p);
        l.frame = static_cast<u8>(f);
        l.generation = s.frame[f].names;
        const bool holds = l.references++ != 0;   // then the bit stands already
        l.at = holds                    ? B_SETTLE
               : c.bug == SETTLED_FIRST ? B_SETTLE
               : c.bug == VERSION_FIRST ? B_BUMP
                                        : B_SET_BIT;
        return true;
    }
    bool settle_task(State &s, int p) const {
        Frame &task = s.frame[frames - 1];
        if (!c.task || p != 1 || task.state != LEASED || task.names) return false;
        task = Frame{};
        return true;
    }
    static bool own_frame_free(const State &s, Local &l, int f) {
        if (!(l.own & fbit(f)) || s.frame[f].state != FREE) return false;
        l.own &= static_cast<u8>(~fbit(f));
        return true;
    }
    bool found_own_frame_free(const State &s, Local &l, int f, u8 then) const {
        return own_frame_free(s, l, f) && drop_reference(l, then, then);
    }
    static bool drop_reference(Local &l, u8 if_more, u8 if_last) {
        if (--l.references) {
            l.at = if_more;
        } else {
            l.at = CLEAR_BIT;
            l.sweep_return = if_last;
        }
        return true;
    }
    static bool sweep_then(Local &l, u8 where) {
        l.sweep_return = where;
        l.at = S_STATE;
        return true;
    }
    static bool return_from_sweep(Local &l) {
        l.at = l.sweep_return;
        l.sweep_return = l.seen_generation = l.seen_version = l.i = 0;
        return true;
    }
};

std::vector<explore::Case<Config>> cases() {
    using explore::Suite;
    const Suite quick = Suite::QUICK, full = Suite::LONG;
    return {
        {"1 receiver, 2 lives, no kill", quick, {.rounds = 2}},
        {"2 receivers, 2 frames, 1 forward, no kill", quick, {.receivers = 2, .frames = 2, .forwards = 1}},
        {"2 receivers, 3 forwards, no kill", quick, {.receivers = 2, .forwards = 3}},
        {"2 receivers, 2 lives, allocator sweeps too",
         quick,
         {.receivers = 2, .rounds = 2, .allocator_sweeps = 1}},
        {"1 receiver, 1 forward, 1 kill", quick, {.forwards = 1, .kills = 1}},
        {"2 receivers, 2 forwards, 1 kill", quick, {.receivers = 2, .forwards = 2, .kills = 1}},
        {"1 receiver, 1 forward, 2 kills, 2 recoverers", quick, {.forwards = 1, .recoverers = 2, .kills = 2}},
        {"1 receiver, 2 kills, 3 recoverers", quick, {.recoverers = 3, .kills = 2}},

        {"words read once, no version", quick, {.forwards = 1, .bug = SINGLE_COLLECT}},
        {"words read twice, no version", quick, {.receivers = 2, .forwards = 3, .bug = DOUBLE_COLLECT}},
        {"version bumped before the bit is set", quick, {.forwards = 1, .bug = VERSION_FIRST}},
        {"version bumped after the frame is settled", quick, {.forwards = 1, .bug = VERSION_LATE}},
        {"frame settled before the bit is set", quick, {.bug = SETTLED_FIRST}},
        {"generation read after the collect", quick, {.rounds = 2, .bug = STATE_READ_LAST}},
        {"frame in flight not held by its allocator", quick, {.bug = FRAME_NOT_HELD}},
        {"reply in place adds a reference", quick, {.task = 1, .bug = REPLY_ADDS_REFERENCE}},
        {"no sweep by releasers", quick, {.bug = NO_SWEEP_AT_RELEASE}},
        {"recovery clears before it sets", quick, {.kills = 1, .bug = CLEARED_FIRST}},
        {"recovery sets no bits", quick, {.kills = 1, .bug = FRAMES_NOT_ADOPTED}},
        {"recovery leaves bits in FREE records",
         quick,
         {.rounds = 2, .forwards = 1, .recoverers = 2, .kills = 2, .bug = CLEARED_UNLESS_FREE}},
        {"place of a dead recoverer given away too early",
         quick,
         {.recoverers = 2, .kills = 2, .bug = PLACE_REUSED}},
        {"recovery does not sweep", quick, {.kills = 1, .bug = NO_SWEEP_AT_RECOVERY}},
        {"recovery clears before it takes the arena",
         quick,
         {.recoverers = 2, .kills = 2, .bug = CLEARED_BEFORE_ARENA}},
        {"recovery takes the arena before it sets", quick, {.recoverers = 2, .kills = 2, .bug = ARENA_FIRST}},

        {"2 receivers, 2 frames, 2 forwards, 1 kill",
         full,
         {.receivers = 2, .frames = 2, .forwards = 2, .kills = 1}},
        {"2 receivers, 1 forward, 2 kills, 2 recoverers",
         full,
         {.receivers = 2, .forwards = 1, .recoverers = 2, .kills = 2}},
        {"1 receiver, 1 forward, 2 lives, 2 kills, 3 recoverers",
         full,
         {.rounds = 2, .forwards = 1, .recoverers = 3, .kills = 2}},
        {"1 receiver, 1 forward, 3 kills, 3 recoverers", full, {.forwards = 1, .recoverers = 3, .kills = 3}},
    };
}

}   // namespace

int main(int argc, char **argv) { return explore::main_of<HolderModel>("holder", cases(), argc, argv); }
