/* SPDX-License-Identifier: BSD-3-Clause */
/* Waiting: a bitmap of waiters per source, and doorbells: semaphores with one waiter each.
 *
 *   waiter                                        the other side
 *   borrow a doorbell, drain old tokens           change the state (one seq_cst CAS)
 *   set its bit at each source     (seq_cst)      load the bitmap (seq_cst): empty -> done, one load, no call
 *   try again                                     clear one bit; if it was set, post that doorbell
 *   sleep; try again; ...
 *   clear its bits; pass the baton on
 *
 * I9   Set-bit / try-again against change / load-bitmap are all sequentially consistent, so one of the two sees
 *      the other: no lost wake-up.
 * I10  Whoever clears a bit posts, always; whoever leaves after having been registered looks whether the source
 *      still has something and notifies the next. So a wake-up that reached somebody busy, or dying, goes on;
 *      what a dead notifier took with it, recovery repairs by ringing every doorbell.
 *
 * The 250 ms slices are a safety net and the moment to look for deaths; wake-ups that only they found are counted.
 */
#include <errno.h>
#include <time.h>

#include "shmr_internal.h"

#define SLICE_NS 250000000
#define SPIN_NS 50000
#define UNSEEN_NS 10000 /* of these, before others are told that somebody waits */
#define BRIEFLY_NS 10000
#ifndef SHMR_SOON_NS
#define SHMR_SOON_NS 100000 /* for what is announced (with none of it in the explorer, where time stands still) */
#endif
#define MISSES_MAX 3   /* after so many spins in vain: no more spinning */
#define PROBE_EVERY 32 /* but try again now and then */
#define LOST_MAX 64    /* bits that others were faster to clear */
#define LOOKED_AT 4    /* waiters, for one that is awake */

int64_t shmr_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- notifying ------------------------------------------------------------------------------------------------------ */

bool shmr_any_waiter(const shmr_word *waiters) {
    for (int w = 0; w < SHMR_WAITER_WORDS; w++)
        if (shmr_load_seq_cst(&waiters[w])) return true; /* S1 S2 S3 S5 I9 */
    return false;
}

static void post(shmr *h, uint32_t doorbell) {
    if (doorbell >= h->g.config.doorbells) return;
    shmr_bell_ring(&shmr_doorbell_at(h, doorbell)->bell);
}

/* Of these waiters one whose bell is rung without a system call, because it spins; the first if none of some does. */
static uint64_t awake_among(shmr *h, int word, uint64_t bits) {
    uint64_t left = bits & (bits - 1) ? bits : 0; /* of one there is no choice */
    for (int k = 0; left && k < LOOKED_AT; k++, left &= left - 1) {
        uint32_t doorbell = (uint32_t)(word * 64) + (uint32_t)__builtin_ctzll(left);
        if (doorbell < h->g.config.doorbells && !shmr_bell_asleep(&shmr_doorbell_at(h, doorbell)->bell))
            return left & -left;
    }
    return bits & -bits;
}

/* A message is about to be committed to this ring: if none of some who wait there is awake, one wakes meanwhile. Its bit
 * stands, and so do all rules: this is one ring of a bell more. Of no use where filling takes longer than spinning. */
void shmr_announce(shmr *h, uint32_t ring) {
    if (ring >= h->g.config.rings) return;
    const shmr_word *waiters = shmr_ring_at(h, ring)->item_waiters;
    for (int w = 0; w < SHMR_WAITER_WORDS; w++) {
        uint64_t bits = shmr_load_relaxed(&waiters[w]); /* a hint */
        if (!bits) continue;
        uint32_t doorbell = (uint32_t)(w * 64) + (uint32_t)__builtin_ctzll(awake_among(h, w, bits));
        if (doorbell >= h->g.config.doorbells) return;
        shmr_word *bell = &shmr_doorbell_at(h, doorbell)->bell;
        uint64_t rest = shmr_load_relaxed(&h->announce_rest); /* private, like the time; a race costs a guess */
        if (rest) shmr_store_relaxed(&h->announce_rest, rest - 1); /* likewise */
        if (rest || !shmr_bell_asleep(bell)) return;
        shmr_store_relaxed(&h->announced_at, (uint64_t)shmr_now()); /* likewise */
        shmr_bell_announce(bell);
        return;
    }
}

/* It is filled, or given up. */
void shmr_announced(shmr *h) {
    int64_t at = (int64_t)shmr_load_relaxed(&h->announced_at); /* private */
    if (!at) return;
    shmr_store_relaxed(&h->announced_at, 0); /* likewise */
    if (shmr_now() - at > SHMR_SOON_NS) shmr_store_relaxed(&h->announce_rest, PROBE_EVERY); /* likewise */
}

void shmr_notify_one(shmr *h, shmr_word *waiters) {
    for (int w = 0; w < SHMR_WAITER_WORDS; w++) {
        uint64_t bits;
        for (int turn = 0; (bits = shmr_load_seq_cst(&waiters[w])); turn++) { /* S1 S2 S3 S5 I9 */
            uint64_t bit = awake_among(h, w, bits);
            if (turn == LOST_MAX) { /* somebody plays with the bits: all of the rest */
                shmr_notify_all(h, waiters);
                return;
            }
            if (!(shmr_and_acq_rel(&waiters[w], ~bit) & bit)) continue; /* A11 R11 W15: another was faster */
            post(h, (uint32_t)(w * 64) + (uint32_t)__builtin_ctzll(bit)); /* I10 */
            return;
        }
    }
}

void shmr_notify_all(shmr *h, shmr_word *waiters) {
    for (int w = 0; w < SHMR_WAITER_WORDS; w++) {
        if (!shmr_load_seq_cst(&waiters[w])) continue; /* S1 S2 S3 S5 I9 */
        uint64_t bits = shmr_exchange_seq_cst(&waiters[w], 0); /* S1 S2 S3 S5 W14 */
        for (; bits; bits &= bits - 1)
            post(h, (uint32_t)(w * 64) + (uint32_t)__builtin_ctzll(bits)); /* I10 */
    }
}

void shmr_ring_all(shmr *h) {
    for (uint32_t i = 0; i < h->g.config.doorbells; i++)
        if (shmr_load_seq_cst(&shmr_doorbell_at(h, i)->owner)) post(h, i); /* S6; extra tokens are harmless */
}

/* ---- doorbells ------------------------------------------------------------------------------------------------------- */

static int borrow_doorbell(shmr *h) {
    int found = -1;
    pthread_mutex_lock(&h->doorbell_lock);
    if (h->doorbell_count) {
        found = (int)h->doorbells[--h->doorbell_count];
    } else {
        for (uint32_t i = 0; i < h->g.config.doorbells && found < 0; i++) {
            shmr_word *owner = &shmr_doorbell_at(h, i)->owner;
            uint64_t nobody = 0;
            if (shmr_load_relaxed(owner) == 0 && /* the CAS decides */
                shmr_cas_seq_cst(owner, &nobody, h->self + 1)) /* S6 A12 */
                found = (int)i;
        }
    }
    pthread_mutex_unlock(&h->doorbell_lock);
    if (found >= 0) shmr_bell_silence(&shmr_doorbell_at(h, (uint32_t)found)->bell); /* an old token */
    return found;
}

static void return_doorbell(shmr *h, int doorbell) {
    pthread_mutex_lock(&h->doorbell_lock);
    if (shmr_count_get(&h->left)) /* nobody will empty the pool any more */
        shmr_store_release(&shmr_doorbell_at(h, (uint32_t)doorbell)->owner, 0); /* R12 W4 */
    else
        h->doorbells[h->doorbell_count++] = (uint32_t)doorbell;
    pthread_mutex_unlock(&h->doorbell_lock);
}

void shmr_return_doorbells(shmr *h) {
    pthread_mutex_lock(&h->doorbell_lock);
    while (h->doorbell_count)
        shmr_store_release(&shmr_doorbell_at(h, h->doorbells[--h->doorbell_count])->owner, 0); /* R12 W4 */
    pthread_mutex_unlock(&h->doorbell_lock);
}

/* ---- waiting ----------------------------------------------------------------------------------------------------------- */

static bool any_ready(const shmr *h, const struct shmr_source *sources, int count) {
    for (int i = 0; i < count; i++)
        if (sources[i].ready && sources[i].ready(h, sources[i].ring)) return true;
    return false;
}

/* A partner that answers from another core does so within a microsecond; one that sleeps takes 45. So spin first,
 * as long as spinning has been gaining: for some microseconds unseen, which costs the partner nothing; then with our
 * bit set, so that whoever notifies finds somebody awake, and wakes nobody who sleeps beside us. */
static bool is_worth_spinning(struct shmr_spin *s) {
    uint64_t turn = shmr_add_relaxed(&s->turns, 1); /* private, like misses; races between threads only cost a wrong guess */
    return shmr_load_relaxed(&s->misses) < MISSES_MAX || turn % PROBE_EVERY == 0;
}

/* Until an attempt is worth it (true), or `end`; the `last` time that is a miss. `s`: the record of it, or NULL: it tells
 * nothing about the next time. `doorbell`: our own, or -1. */
static bool spin(shmr *h, const struct shmr_source *sources, int count, struct shmr_spin *s, bool last, int doorbell,
                 int64_t end) {
    do {
        for (int i = 0; i < 16; i++) {
            if (any_ready(h, sources, count) ||
                (doorbell >= 0 && shmr_bell_rung(&shmr_doorbell_at(h, (uint32_t)doorbell)->bell))) {
                if (s && shmr_load_relaxed(&s->misses)) shmr_store_relaxed(&s->misses, 0);
                return true;
            }
            shmr_pause();
        }
    } while (shmr_now() < end);
    if (!s) return false;
    uint64_t misses = shmr_load_relaxed(&s->misses);
    if (last && misses < MISSES_MAX) shmr_store_relaxed(&s->misses, misses + 1);
    return false;
}

static int64_t earlier(int64_t end, int64_t deadline) { return deadline > 0 && deadline < end ? deadline : end; }

/* 0, or EAGAIN, ETIMEDOUT or EINTR, as shmr_bell_wait. */
static int sleep_until(shmr *h, int doorbell, int64_t end) {
    if (doorbell >= 0) return shmr_bell_wait(&shmr_doorbell_at(h, (uint32_t)doorbell)->bell, end);
    struct timespec t = {0, 1000000}; /* more sleeping threads than doorbells: look again in a millisecond */
    return nanosleep(&t, NULL) == 0 ? 0 : errno;
}

/* Give back whole free extents and groups if somebody is short of them: called before every sleep. */
void shmr_relieve(shmr *h) {
    if (!shmr_any_waiter(shmr_header_of(h)->extent_waiters)) return;
    pthread_mutex_lock(&h->lock);
    shmr_drain_freed(h);
    shmr_arena_trim(h);
    shmr_trim_groups(h);
    pthread_mutex_unlock(&h->lock);
}

void shmr_trim(shmr *h) {
    if (shmr_usable(h) == SHMR_FORKED) return;
    pthread_mutex_lock(&h->lock);
    shmr_sweep(h);
    shmr_arena_trim(h);
    shmr_trim_groups(h);
    pthread_mutex_unlock(&h->lock);
}

void shmr_leave_extents(shmr *h, uint32_t count) {
    pthread_mutex_lock(&h->lock);
    h->arena.leave = count;
    pthread_mutex_unlock(&h->lock);
}

/* A slice ended, and there is something. Did it come just now, with the post on its way to us or to another waiter?
 * Only if it lies there for another slice, with our bit standing, and nobody rings and nobody takes it, a wake-up was
 * lost: on a busy machine who is about to ring may be kept from it for some of these 25 ms. EINTR, or 0: somebody rang, or there is nothing after all; ETIMEDOUT: lost. */
static int await_post(shmr *h, const struct shmr_source *sources, int count, int doorbell) {
    for (int k = 0; k < 10; k++) {
        if (!any_ready(h, sources, count)) return 0;
        int error = sleep_until(h, doorbell, shmr_now() + SLICE_NS / 10);
        if (error != ETIMEDOUT) return error;
    }
    for (int i = 0; i < count; i++)
        if (!(shmr_load_relaxed(&sources[i].waiters[doorbell / 64]) >> (doorbell % 64) & 1)) return 0; /* statistics */
    return any_ready(h, sources, count) ? ETIMEDOUT : 0;
}

/* Who only polls looks, too, as often as a sleeper does. True: that may have found something. */
bool shmr_look(shmr *h, bool for_space) {
    int64_t now = shmr_now();
    if (now < (int64_t)shmr_load_relaxed(&h->next_look)) return false; /* private; a race costs a look */
    shmr_store_relaxed(&h->next_look, (uint64_t)(now + SLICE_NS));     /* likewise */
    bool found = shmr_check_deaths(h) > 0;
    shmr_retry_inserts(h);
    if (!for_space) return found;
    shmr_adopt_orphans(h);
    pthread_mutex_lock(&h->lock);
    shmr_sweep(h);
    pthread_mutex_unlock(&h->lock);
    return true;
}

/* Call attempt() until it returns something else than WOULD_BLOCK, sleeping on the sources in between. */
int shmr_wait(shmr *h, const struct shmr_source *sources, int count, enum shmr_spin_kind kind,
              int (*attempt)(shmr *h, void *argument), void *argument, int64_t deadline) {
    int status = SHMR_WOULD_BLOCK;
    bool brief = deadline == SHMR_BRIEFLY;
    struct shmr_spin *s = &h->spin[kind + (brief ? SHMR_SPIN_KINDS : 0)];
    bool spinning = is_worth_spinning(s);
    int64_t began = spinning ? shmr_now() : 0;
    if (spinning &&
        spin(h, sources, count, s, brief, -1, earlier(began + (brief ? BRIEFLY_NS : UNSEEN_NS), deadline))) {
        status = attempt(h, argument);
        if (status != SHMR_WOULD_BLOCK) return status;
    }
    if (brief) return status;
    int doorbell = borrow_doorbell(h);
    bool watching_space = sources[0].waiters == shmr_participant_at(h, h->self)->space_waiters;
    bool by_slice = false, lost = false, announced = false;
    int64_t next_look = 0;
    for (;;) {
        bool ask = doorbell < 0 && watching_space;
        for (int i = 0; doorbell >= 0 && i < count; i++) {
            uint64_t bit = UINT64_C(1) << (doorbell % 64);
            uint64_t before = shmr_or_seq_cst(&sources[i].waiters[doorbell / 64], bit); /* S1 S2 S3 S5 */
            ask |= sources[i].waiters == shmr_header_of(h)->extent_waiters && !(before & bit);
        }
        if (ask) shmr_ring_all(h); /* whoever sleeps on whole free extents gives them back, now that our bit stands:
                                      at each time that it was cleared, and no more often, or two would ask for ever */
        status = attempt(h, argument);
        if (status != SHMR_WOULD_BLOCK) {
            if (lost && status == SHMR_OK)
                shmr_add_relaxed(&shmr_participant_at(h, h->self)->rescued_wakeups, 1); /* statistics */
            break;
        }
        if (shmr_load_seq_cst(&shmr_header_of(h)->poisoned)) { /* S6: whoever set it rang */
            status = shmr_poisoned();
            break;
        }
        int64_t now = shmr_now();
        if (deadline >= 0 && now >= deadline) {
            status = SHMR_TIMEOUT;
            break;
        }
        if (now >= next_look) {
            pthread_mutex_lock(&h->lock); /* a close by another thread would make the descriptor another file's */
            bool cut = shmr_check_file(h) == SHMR_CORRUPT;
            pthread_mutex_unlock(&h->lock);
            if (cut) {
                status = SHMR_CORRUPT;
                break;
            }
            bool found = shmr_check_deaths(h) > 0;
            shmr_retry_inserts(h);
            next_look = now + SLICE_NS;
            if (watching_space) {
                shmr_adopt_orphans(h);
                pthread_mutex_lock(&h->lock);
                shmr_sweep(h);
                pthread_mutex_unlock(&h->lock);
                if (!by_slice) { /* the first time: what that found is worth an attempt before sleeping */
                    status = attempt(h, argument);
                    if (status != SHMR_WOULD_BLOCK) break;
                }
            }
            if (found || shmr_load_relaxed(&shmr_header_of(h)->deaths)) { /* a hint: shmr_alone looks itself */
                /* Who left may have recovered messages for which there was no room. */
                if (!watching_space && !(h->g.config.flags & SHMR_CREATOR_RECOVERS)) shmr_adopt_messages(h);
                status = attempt(h, argument);
                if (status != SHMR_WOULD_BLOCK) break;
                if (!(h->g.config.flags & SHMR_WAIT_ALONE) && shmr_alone(h)) {
                    status = SHMR_PEER_LOST;
                    break;
                }
            }
        }
        if (spinning) {
            spinning = false;
            int64_t end = began + (announced ? SHMR_SOON_NS : SPIN_NS);
            if (spin(h, sources, count, announced ? NULL : s, true, doorbell, earlier(end, deadline))) continue;
        }
        if (!watching_space) shmr_relieve(h);
        int64_t end = now + SLICE_NS;
        if (deadline >= 0 && deadline < end) end = deadline;
        uint64_t deaths = shmr_load_relaxed(&shmr_header_of(h)->deaths); /* statistics */
        int error = sleep_until(h, doorbell, end);
        by_slice = error == ETIMEDOUT;
        lost = false;
        if (by_slice && doorbell >= 0 && end == now + SLICE_NS) {
            error = await_post(h, sources, count, doorbell);
            lost = error == ETIMEDOUT && !shmr_death_since(h, deaths); /* then it is recovery that wakes us, or will */
        }
        announced = error == EAGAIN;
        if (announced) {
            spinning = true;
            began = shmr_now();
        }
        if (error == EINTR) {
            status = attempt(h, argument); /* we may hold a baton */
            if (status == SHMR_WOULD_BLOCK) status = SHMR_INTERRUPTED;
            break;
        }
    }
    if (doorbell >= 0) {
        for (int i = 0; i < count; i++)
            shmr_and_acq_rel(&sources[i].waiters[doorbell / 64], ~(UINT64_C(1) << (doorbell % 64))); /* A11 R11 W3 */
        for (int i = 0; i < count; i++) /* I10 */
            if (sources[i].baton && sources[i].ready(h, sources[i].ring)) shmr_notify_one(h, sources[i].waiters);
        return_doorbell(h, doorbell);
    }
    return status;
}
