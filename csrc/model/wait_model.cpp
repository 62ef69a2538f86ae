/* SPDX-License-Identifier: BSD-3-Clause */
// Model of waiting: one bitmap of waiters for each source, one doorbell (a semaphore with one waiter) for
// each process.
//
// Sources: items      messages in a ring: notify_one; who leaves a wait passes the baton on if items remain
//          space      free blocks of one arena, for threads of its owner: notify_all, as needs differ
//          extents    free extents of the region, in a common pool: notify_all
// Shared:  items, space, pool   counts: ring and block table are abstracted, taking is one step
//          spare[p]             fully free extents of p's arena; p alone may give them to the pool
//          waiters[source]      bitmaps
//          tokens[p]            doorbells
//
// A waiter registers with every source it wants, looks at all of them again, and sleeps; woken, it looks
// again; leaving, it unregisters from all. Shortage: who registers for extents posts everybody who is
// registered anywhere; who is about to sleep looks at the extent waiters and gives its spare extents to the
// pool; who frees the last block of somebody else's extent posts the owner of that extent if there are
// extent waiters.
//
// Checked: from every reachable state the run can come to rest (nobody can move), and at rest nobody sleeps
// beside what it wants: no lost wake-up, no swallowed baton, no waiters that wake each other for ever.
#include "explore.hpp"

namespace {

enum { MAX_PROCESSES = 7, MAX_ACTORS = 6, NOBODY = 15 };
enum Source { ITEM, SPACE, EXTENT, SOURCES };
enum Wants { WANTS_ITEM = 1 << ITEM, WANTS_SPACE = 1 << SPACE, WANTS_EXTENT = 1 << EXTENT };
enum Kind { NONE_, PUT, RELEASE, RELEASE_SPARE, WAIT };
enum Bug {
    NO_BUG,
    NO_RECHECK,         // sleeps after registering without looking again
    ONE_RECHECKED,      // looks again at the first source only
    BATON_DROPPED,      // leaves without notifying the next one although items remain
    STAYS_REGISTERED,   // leaves without unregistering
    ITEM_BIT_STAYS,     // leaves unregistering from the other source only
    NO_RING_ALL,        // recovery does not ring all doorbells
    PENDING_FLAG,      // a flag "already posted": who dies between flag and post disables the doorbell
    SPACE_TO_ONE,      // a release notifies one space waiter instead of all
    NO_ASKING,         // an extent waiter posts nobody
    ASKS_FIRST_TIME,   // it asks once a wait, not each time it registers anew
    ASKS_EARLY,        // it asks once, before it registers
    ASKS_ALWAYS,       // it asks whenever it woke, even if its bit was still set
    NO_LOOK,           // nobody looks at the extent waiters before sleeping
    EARLY_LOOK,        // ... or looks before registering
    SILENT_RETURN,     // spare extents are returned without notifying
    SILENT_ROLLBACK,   // extents taken in vain (not enough of them) are given back without notifying
    BLIND_RELEASE,     // freeing the last block of another's extent posts nobody
};

struct Actor {
    int kind = NONE_;
    int wants = 0, need = 1;   // WAIT: sources, and how much space or how many extents
    int times = 1;             // WAIT: so many successes, then busy for ever
    int spare = 0;             // WAIT: spare extents at first
    int target = 0;            // RELEASE_SPARE: the process whose extent it is
    int thread_of = -1;        // dies with that process
};
struct Config {
    Actor who[MAX_ACTORS] = {};
    int recoverers = 1, kills = 0, timeouts = 0;
    int pool = 0;
    Bug bug = NO_BUG;
};

#define STEPS(X)                                                                                           \
    X(DEAD) X(DONE) X(PUT_ITEM) X(FREE_BLOCK) X(FREE_LAST_BLOCK) X(LOAD_EXTENT_WAITERS) X(FIND_OWNER)      \
    X(POST_OWNER) X(ONE_LOAD) X(ONE_CLEAR) X(ONE_FLAG) X(ONE_POST) X(ALL_LOAD) X(ALL_CLEAR) X(ALL_POST)    \
    X(W_TRY) X(W_DRAIN_DOORBELL) X(W_REGISTER) X(W_FIND_SLEEPERS) X(W_POST_SLEEPER) X(W_LOOK)              \
    X(W_RETURN) X(W_RECHECK) X(W_SLEEP) X(W_WOKEN) X(W_LAST_TRY) X(W_GIVE_BACK) X(W_UNREGISTER)            \
    X(W_BATON) X(R_IDLE) X(R_CLEAR) X(R_ADOPT) X(R_RING) X(R_DONE)                                         \
    /* a place to return to; never a process's own position */                                             \
    X(W_LEFT)
enum Step : u8 { STEPS(EXPLORE_NAME) };
const char *const STEP_NAME[] = {STEPS(EXPLORE_STRING)};

struct Local {
    u8 at, notify_return;
    u8 source;                 // loop over sources
    u8 mask, waiter, notify;   // waiters seen; whom we are about to post; the source we notify
    u8 asking, asked;          // my bit was not set: ask the others; asked in this wait
    u8 successes, resume;
    u8 victim, i;
};
struct WaitState {
    u8 items, space, pool, kills, timeouts;
    u8 waiters[SOURCES];
    u8 tokens[MAX_PROCESSES], pending[MAX_PROCESSES], spare[MAX_PROCESSES], taken[MAX_PROCESSES];
    u8 recovered[MAX_PROCESSES], recoverer[MAX_PROCESSES];
    Local local[MAX_PROCESSES];
};

class WaitModel {
    const Config c;
    int actors = 0, last, used = 0;   // used: the sources somebody wants

  public:
    using State = WaitState;

    explicit WaitModel(const Config &config) : c(config) {
        while (actors < MAX_ACTORS && c.who[actors].kind != NONE_) used |= c.who[actors++].wants;
        last = actors + c.recoverers - 1;
    }

    int processes() const { return last + 1; }

    State initial() const {
        State s{};
        s.kills = static_cast<u8>(c.kills);
        s.timeouts = static_cast<u8>(c.timeouts);
        s.pool = static_cast<u8>(c.pool);
        for (int p = 0; p <= last; p++) {
            s.recoverer[p] = NOBODY;
            s.local[p].at = R_IDLE;
            if (p >= actors) continue;
            const Actor &a = c.who[p];
            s.spare[p] = static_cast<u8>(a.spare);
            s.local[p].at = a.kind == PUT             ? PUT_ITEM
                            : a.kind == RELEASE       ? FREE_BLOCK
                            : a.kind == RELEASE_SPARE ? FREE_LAST_BLOCK
                                                      : W_TRY;
        }
        return s;
    }

    // At rest, and nobody sleeps beside what it wants.
    bool good(const State &s) const {
        int spare = s.pool;
        for (int p = 0; p < actors; p++)
            if (s.local[p].at == W_SLEEP) spare += s.spare[p];
        for (int p = 0; p <= last; p++) {
            const Local &l = s.local[p];
            if (dead(s, p) ? !s.recovered[p] : l.at != DONE && l.at != R_IDLE && l.at != W_SLEEP)
                return false;
            if (l.at != W_SLEEP) continue;
            const Actor &a = c.who[p];
            if (s.tokens[p]) return false;
            if (a.wants & WANTS_ITEM && s.items) return false;
            if (a.wants & WANTS_SPACE && s.space >= a.need) return false;
            if (a.wants & WANTS_EXTENT && spare >= a.need) return false;
        }
        return true;
    }

    void normalise(State &s) const {
        for (int p = 0; p <= last; p++) {
            Local &l = s.local[p];
            if (l.at != DONE && l.at != DEAD) continue;
            const u8 at = l.at;
            l = Local{};
            l.at = at;
            s.tokens[p] = s.pending[p] = 0;
            if (at == DONE) s.spare[p] = 0;   // busy for ever: out of reach
        }
    }

    std::string describe(const State &s, int p) const {
        static const char *const ROLE[] = {"recoverer ", "putter ", "releaser ", "spare releaser ",
                                           "waiter "};
        return ROLE[p < actors ? c.who[p].kind : 0] + std::to_string(p) + " " + STEP_NAME[s.local[p].at];
    }

    bool kill(State &s, int p) const {
        if (!s.kills || p == last || !alive(s, p)) return false;
        if (p >= actors && s.kills == c.kills) return false;       // nothing to recover from yet
        if (p < actors && c.who[p].thread_of >= 0) return false;   // dies with the others of its process
        s.kills--;
        s.local[p].at = DEAD;
        for (int q = 0; q < actors; q++)
            if (c.who[q].thread_of == p && alive(s, q)) s.local[q].at = DEAD;
        return true;
    }

    bool expire(State &s, int p) const {
        if (!s.timeouts || s.local[p].at != W_SLEEP) return false;
        s.timeouts--;
        return look_at_sources(s.local[p], W_LAST_TRY, p);
    }

    int choices(const State &s, int p) const { return s.local[p].at == ONE_CLEAR ? last + 2 : 1; }

    bool step(State &s, int p, int choice, const char *&) const {
        Local &l = s.local[p];
        auto go = [&](u8 at) {
            l.at = at;
            return true;
        };
        switch (l.at) {
        case DEAD:
        case DONE:
            return false;

        // ---- those who make something available -------------------------------------------------------
        case PUT_ITEM:
            s.items++;
            return notify(l, ONE_LOAD, ITEM, DONE);
        case FREE_BLOCK:
            s.space++;
            return notify(l, c.bug == SPACE_TO_ONE ? ONE_LOAD : ALL_LOAD, SPACE, DONE);
        case FREE_LAST_BLOCK:   // of an extent of `target`: spare from now on, but `target` must return it
            s.spare[c.who[p].target]++;
            return go(c.bug == BLIND_RELEASE ? DONE : LOAD_EXTENT_WAITERS);
        case LOAD_EXTENT_WAITERS:
            l.source = first_source(used);
            return go(s.waiters[EXTENT] ? FIND_OWNER : DONE);
        case FIND_OWNER:
            if (s.waiters[l.source] & bit(c.who[p].target)) return go(POST_OWNER);
            return next_source(l, used) ? true : go(DONE);
        case POST_OWNER:
            post(s, c.who[p].target);
            return go(DONE);

        // ---- notify_one: any waiter may be picked; if all are gone meanwhile, look again --------------
        case ONE_LOAD:
            return s.waiters[l.notify] ? go(ONE_CLEAR) : return_from_notify(s, p);
        case ONE_CLEAR:
            if (choice == 0) return s.waiters[l.notify] ? false : go(ONE_LOAD);
            if (!(s.waiters[l.notify] & bit(choice - 1))) return false;
            s.waiters[l.notify] &= static_cast<u8>(~bit(choice - 1));
            l.waiter = static_cast<u8>(choice - 1);
            return go(c.bug == PENDING_FLAG ? ONE_FLAG : ONE_POST);
        case ONE_FLAG:
            if (s.pending[l.waiter]) return l.waiter = 0, return_from_notify(s, p);
            s.pending[l.waiter] = 1;
            return go(ONE_POST);
        case ONE_POST:
            post(s, l.waiter);
            l.waiter = 0;
            return return_from_notify(s, p);

        // ---- notify_all -------------------------------------------------------------------------------
        case ALL_LOAD:
            l.mask = s.waiters[l.notify];
            return l.mask ? go(ALL_CLEAR) : return_from_notify(s, p);
        case ALL_CLEAR: {
            const u8 b = static_cast<u8>(l.mask & -l.mask);
            if (s.waiters[l.notify] & b) {
                s.waiters[l.notify] &= static_cast<u8>(~b);
                return go(ALL_POST);
            }
            l.mask &= static_cast<u8>(~b);
            return l.mask ? true : return_from_notify(s, p);
        }
        case ALL_POST:
            post(s, __builtin_ctz(l.mask));
            l.mask &= static_cast<u8>(l.mask - 1);
            return l.mask ? go(ALL_CLEAR) : return_from_notify(s, p);

        // ---- waiter -----------------------------------------------------------------------------------
        case W_TRY:
            return attempt(s, p, W_DRAIN_DOORBELL);
        case W_DRAIN_DOORBELL:
            if (s.tokens[p]) {
                s.tokens[p]--;
                s.pending[p] = 0;
                return true;
            }
            l.source = first_source(wants(p));
            if (c.bug == ASKS_EARLY && wants(p) & WANTS_EXTENT && !l.asked) {
                l.source = first_source(used);
                return go(W_FIND_SLEEPERS);
            }
            return go(c.bug == EARLY_LOOK ? W_LOOK : W_REGISTER);
        case W_REGISTER:
            // Ask only if my bit was not set: otherwise all have been asked, and two waiters would wake each
            // other for ever.
            if (l.source == EXTENT) {
                l.asking = !(s.waiters[EXTENT] & bit(p));
                if (c.bug == ASKS_ALWAYS) l.asking = 1;
                if (c.bug == ASKS_FIRST_TIME && l.asked) l.asking = 0;
                if (c.bug == NO_ASKING || c.bug == ASKS_EARLY) l.asking = 0;
                if (c.bug == ASKS_FIRST_TIME) l.asked = 1;
            }
            s.waiters[l.source] |= bit(p);
            if (next_source(l, wants(p))) return true;
            l.source = first_source(used);
            return l.asking ? go(W_FIND_SLEEPERS) : look(l, p);
        case W_FIND_SLEEPERS:
            l.mask |= static_cast<u8>(s.waiters[l.source] & ~bit(p));
            if (next_source(l, used)) return true;
            return l.mask ? go(W_POST_SLEEPER) : asked(l, p);
        case W_POST_SLEEPER:
            post(s, __builtin_ctz(l.mask));
            l.mask &= static_cast<u8>(l.mask - 1);
            return l.mask ? true : asked(l, p);
        case W_LOOK:
            if (s.waiters[EXTENT] & ~bit(p) && s.spare[p]) return go(W_RETURN);
            return c.bug == EARLY_LOOK ? go(W_REGISTER) : look_at_sources(l, W_RECHECK, p);
        case W_RETURN: {
            s.pool = static_cast<u8>(s.pool + s.spare[p]);
            s.spare[p] = 0;
            const u8 then = c.bug == EARLY_LOOK ? W_REGISTER : W_RECHECK;
            look_at_sources(l, then, p);
            return c.bug == SILENT_RETURN ? true : notify(l, ALL_LOAD, EXTENT, then);
        }
        case W_RECHECK:
            if (c.bug == NO_RECHECK) return l.source = 0, go(W_SLEEP);
            if (c.bug == ONE_RECHECKED && l.source != ITEM) return l.source = 0, go(W_SLEEP);
            return attempt(s, p, W_SLEEP);
        case W_SLEEP:
            if (!s.tokens[p]) return false;
            s.tokens[p]--;
            s.pending[p] = 0;
            return look_at_sources(l, W_WOKEN, p);
        case W_WOKEN:
            return attempt(s, p, W_DRAIN_DOORBELL);
        case W_LAST_TRY:   // timed out
            return attempt(s, p, W_UNREGISTER);
        case W_GIVE_BACK:   // somebody was faster: what we took so far is of no use to us
            s.pool = static_cast<u8>(s.pool + s.taken[p]);
            s.taken[p] = 0;
            l.at = l.resume;
            l.resume = 0;
            return c.bug == SILENT_ROLLBACK ? true : notify(l, ALL_LOAD, EXTENT, l.at);
        case W_UNREGISTER:
            if (c.bug != STAYS_REGISTERED && !(c.bug == ITEM_BIT_STAYS && l.source == ITEM))
                s.waiters[l.source] &= static_cast<u8>(~bit(p));
            if (next_source(l, wants(p))) return true;
            l.source = 0;
            if (!(wants(p) & WANTS_ITEM) || c.bug == BATON_DROPPED) return left(s, p);
            return go(W_BATON);
        case W_BATON:
            return s.items ? notify(l, ONE_LOAD, ITEM, W_LEFT) : left(s, p);

        // ---- recovery ---------------------------------------------------------------------------------
        case R_IDLE: {
            int d = 0;
            while (d <= last && !recoverable(s, d, p)) d++;
            if (d > last) return false;
            s.recoverer[d] = static_cast<u8>(p);
            l.victim = static_cast<u8>(d);
            l.source = first_source(used);
            return go(R_CLEAR);
        }
        case R_CLEAR:
            s.waiters[l.source] &= static_cast<u8>(~bit(l.victim));
            return next_source(l, used) ? true : go(R_ADOPT);
        case R_ADOPT:   // the adopter returns what is spare; ring-all notifies the extent waiters
            s.pool = static_cast<u8>(s.pool + s.spare[l.victim] + s.taken[l.victim]);
            s.spare[l.victim] = s.taken[l.victim] = 0;
            return c.bug == NO_RING_ALL ? go(R_DONE) : go(R_RING);
        case R_RING:
            if (l.i < actors && alive(s, l.i) && c.who[l.i].kind == WAIT &&
                !(c.bug == PENDING_FLAG && s.pending[l.i]))
                post(s, l.i);
            do l.i++;
            while (l.i < actors && !(alive(s, l.i) && c.who[l.i].kind == WAIT));
            return l.i < actors ? true : go(R_DONE);
        case R_DONE:
            s.recovered[l.victim] = 1;
            l.victim = l.i = 0;
            return go(R_IDLE);
        }
        return false;
    }

  private:
    static u8 bit(int p) { return static_cast<u8>(1 << p); }
    int wants(int p) const { return c.who[p].wants; }
    static bool dead(const State &s, int p) { return s.local[p].at == DEAD; }
    static bool alive(const State &s, int p) { return s.local[p].at != DEAD && s.local[p].at != DONE; }
    bool recoverable(const State &s, int d, int me) const {
        return d != me && dead(s, d) && !s.recovered[d] &&
               (s.recoverer[d] == NOBODY || dead(s, s.recoverer[d]));
    }
    static void post(State &s, int p) {
        s.tokens[p] = 1;   // a binary semaphore: who has been rung for already looks again once
    }

    static u8 first_source(int sources) { return static_cast<u8>(__builtin_ctz(sources)); }
    static bool next_source(Local &l, int sources) {   // false: that was the last one, l.source is 0 again
        do l.source++;
        while (l.source < SOURCES && !(sources >> l.source & 1));
        if (l.source == SOURCES) l.source = 0;
        return l.source != 0;
    }

    // One access to the source at hand. Success leaves the wait; failure looks at the next one, or goes on.
    bool attempt(State &s, int p, u8 otherwise) const {
        const int need = c.who[p].need;
        Local &l = s.local[p];
        switch (l.source) {
        case ITEM:
            if (!s.items) break;
            s.items--;
            return succeed(s, p);
        case SPACE:
            if (s.space < need) break;
            s.space = static_cast<u8>(s.space - need);
            return succeed(s, p);
        case EXTENT: {   // one at a time, but not even one unless enough are in sight
            const int own = s.spare[p] < need ? s.spare[p] : need;
            if (!s.taken[p] && s.pool < need - own) break;
            if (own + s.taken[p] < need) {
                if (!s.pool) {
                    l.resume = l.at;
                    l.at = W_GIVE_BACK;
                    return true;
                }
                s.pool--;
                s.taken[p]++;
                if (own + s.taken[p] < need) return true;
            }
            s.spare[p] = static_cast<u8>(s.spare[p] - own);
            s.taken[p] = 0;
            return succeed(s, p);
        }
        }
        if (next_source(l, wants(p))) return true;
        if (otherwise == W_UNREGISTER) return leave(l, p);
        l.at = otherwise;
        return true;
    }
    bool succeed(State &s, int p) const { return s.local[p].at == W_TRY ? left(s, p) : leave(s.local[p], p); }

    bool look_at_sources(Local &l, u8 at, int p) const {
        l.source = first_source(wants(p));
        l.at = at;
        return true;
    }
    bool look(Local &l, int p) const {   // at the extent waiters, if there can be any; then at my sources
        look_at_sources(l, W_RECHECK, p);
        if (used & WANTS_EXTENT && c.bug != NO_LOOK && c.bug != EARLY_LOOK) l.at = W_LOOK;
        return true;
    }
    bool asked(Local &l, int p) const {
        l.asking = 0;
        if (c.bug != ASKS_EARLY) return look(l, p);
        l.asked = 1;
        return look_at_sources(l, W_REGISTER, p);
    }
    bool leave(Local &l, int p) const {
        l.asked = 0;
        return look_at_sources(l, W_UNREGISTER, p);
    }
    bool left(State &s, int p) const {
        Local &l = s.local[p];
        l.successes++;
        l.at = DONE;
        return l.successes < c.who[p].times ? look_at_sources(l, W_TRY, p) : true;
    }

    static bool notify(Local &l, u8 how, Source source, u8 then) {
        l.at = how;
        l.notify = static_cast<u8>(source);
        l.notify_return = then;
        return true;
    }
    bool return_from_notify(State &s, int p) const {
        Local &l = s.local[p];
        l.at = l.notify_return;
        l.notify = l.notify_return = 0;
        return l.at == W_LEFT ? left(s, p) : true;
    }
};

constexpr Actor put() { return {.kind = PUT}; }
constexpr Actor release() { return {.kind = RELEASE}; }
constexpr Actor release_spare_of(int p) { return {.kind = RELEASE_SPARE, .target = p}; }
constexpr Actor wait(int wants, int need = 1) { return {.kind = WAIT, .wants = wants, .need = need}; }
constexpr Actor thread_of(int p, Actor a) {
    a.thread_of = p;
    return a;
}
constexpr Actor holding(int spare,
                        Actor a) {   // comes back to its wait, as what is spare must not vanish in a busy one
    a.spare = spare;
    a.times = 9;
    return a;
}

std::vector<explore::Case<Config>> cases() {
    using explore::Suite;
    const Suite quick = Suite::QUICK, full = Suite::LONG;
    const Actor item = wait(WANTS_ITEM), extent = wait(WANTS_EXTENT);
    return {
        {"items: 2 put, 2 wait", quick, {.who = {put(), put(), item, item}}},
        {"items: 2 put, 2 wait, 1 kill, 1 timeout",
         quick,
         {.who = {put(), put(), item, item}, .kills = 1, .timeouts = 1}},
        {"items: 2 put, 2 wait, 2 kills, 2 recoverers",
         quick,
         {.who = {put(), put(), item, item}, .recoverers = 2, .kills = 2}},
        {"space: 3 release, 2 threads need 2 and 1, 1 kill",
         quick,
         {.who = {release(), release(), release(), wait(WANTS_SPACE, 2), thread_of(3, wait(WANTS_SPACE))},
          .kills = 1}},
        {"items or space: 2 put, 1 release, one waits for both, one for items, 1 kill",
         quick,
         {.who = {put(), put(), release(), wait(WANTS_ITEM | WANTS_SPACE), item}, .kills = 1}},
        {"items or space: 1 put, 1 release, two wait for both, 1 kill, 1 timeout",
         quick,
         {.who = {put(), release(), wait(WANTS_ITEM | WANTS_SPACE),
                  thread_of(2, wait(WANTS_ITEM | WANTS_SPACE))},
          .kills = 1,
          .timeouts = 1}},
        {"extents: 1 needs one, 1 asleep on items holds one, 1 put, 1 kill",
         quick,
         {.who = {extent, holding(1, item), put()}, .kills = 1}},
        {"extents: 1 needs two, 2 asleep on items hold one each, 1 kill",
         quick,
         {.who = {wait(WANTS_EXTENT, 2), holding(1, item), holding(1, item)}, .kills = 1}},
        {"extents: 2 need two and hold one each, 1 kill",
         quick,
         {.who = {holding(1, wait(WANTS_EXTENT, 2)), holding(1, wait(WANTS_EXTENT, 2))}, .kills = 1}},
        {"extents: 2 need one, 1 needs two, 2 in the pool, 1 kill",
         quick,
         {.who = {wait(WANTS_EXTENT, 2), extent, extent}, .kills = 1, .pool = 2}},
        {"extents: a sleeper's last block is released by a third, 1 put, 1 kill",
         quick,
         {.who = {extent, holding(0, item), release_spare_of(1), put()}, .kills = 1}},
        {"extents or items: 1 waits for both, 1 asleep on items holds one, 1 put, 2 kills, 2 recoverers",
         quick,
         {.who = {wait(WANTS_EXTENT | WANTS_ITEM), holding(1, item), put()}, .recoverers = 2, .kills = 2}},

        {"no second look after registering", quick, {.who = {put(), item}, .bug = NO_RECHECK}},
        {"second look at one source only",
         quick,
         {.who = {release(), wait(WANTS_ITEM | WANTS_SPACE)}, .bug = ONE_RECHECKED}},
        {"baton dropped, items", quick, {.who = {put(), put(), item, item}, .bug = BATON_DROPPED}},
        {"baton dropped, by one who left with space",
         quick,
         {.who = {put(), release(), wait(WANTS_ITEM | WANTS_SPACE), item}, .bug = BATON_DROPPED}},
        {"left without unregistering", quick, {.who = {put(), put(), item, item}, .bug = STAYS_REGISTERED}},
        {"unregistered from one of two sources",
         quick,
         {.who = {put(), release(), wait(WANTS_ITEM | WANTS_SPACE), item}, .bug = ITEM_BIT_STAYS}},
        {"no ring-all", quick, {.who = {put(), put(), item, item}, .kills = 1, .bug = NO_RING_ALL}},
        {"a pending flag on the doorbell",
         quick,
         {.who = {put(), put(), item, item}, .kills = 1, .bug = PENDING_FLAG}},
        {"release notifies one space waiter",
         quick,
         {.who = {release(), wait(WANTS_SPACE, 2), thread_of(1, wait(WANTS_SPACE))}, .bug = SPACE_TO_ONE}},
        {"extent waiter posts nobody", quick, {.who = {extent, holding(1, item)}, .bug = NO_ASKING}},
        {"extent waiter asks once a wait",
         quick,
         {.who = {wait(WANTS_EXTENT, 2), holding(1, item), holding(1, item)}, .bug = ASKS_FIRST_TIME}},
        {"extent waiter asks before it registers",
         quick,
         {.who = {extent, holding(1, item)}, .bug = ASKS_EARLY}},
        {"extent waiters ask whenever they wake", quick, {.who = {extent, extent}, .bug = ASKS_ALWAYS}},
        {"sleepers do not look at extent waiters",
         quick,
         {.who = {extent, holding(1, item)}, .bug = NO_LOOK}},
        {"sleepers look before registering", quick, {.who = {extent, holding(1, item)}, .bug = EARLY_LOOK}},
        {"extents returned silently", quick, {.who = {extent, holding(1, item)}, .bug = SILENT_RETURN}},
        {"release of the last block in another's extent posts nobody",
         quick,
         {.who = {extent, holding(0, item), release_spare_of(1)}, .bug = BLIND_RELEASE}},

        {"extents taken in vain are given back silently",
         full,
         {.who = {wait(WANTS_EXTENT, 2), extent, extent, holding(2, item)}, .bug = SILENT_ROLLBACK}},
        {"items: 3 put, 3 wait, 1 kill", full, {.who = {put(), put(), put(), item, item, item}, .kills = 1}},
        {"items: 2 put, 2 wait, 2 kills, 2 timeouts, 2 recoverers",
         full,
         {.who = {put(), put(), item, item}, .recoverers = 2, .kills = 2, .timeouts = 2}},
        {"items or space: 2 put, 2 release, one waits for both, one for items, 1 kill",
         full,
         {.who = {put(), put(), release(), release(), wait(WANTS_ITEM | WANTS_SPACE), item}, .kills = 1}},
        {"extents: 1 needs one, 1 needs two, 2 asleep on items hold one each",
         full,
         {.who = {extent, wait(WANTS_EXTENT, 2), holding(1, item), holding(1, item)}}},
        {"extents, items: 1 waits for both, a sleeper's last block released, 1 put, 2 kills, 2 recoverers",
         full,
         {.who = {wait(WANTS_EXTENT | WANTS_ITEM), holding(0, item), release_spare_of(1), put()},
          .recoverers = 2,
          .kills = 2}},
    };
}

}   // namespace

int main(int argc, char **argv) { return explore::main_of<WaitModel>("wait", cases(), argc, argv); }
