/* SPDX-License-Identifier: BSD-3-Clause */
/* Part of explore.c: what the memory of the machine may do, after C11 (see explore.h). */
#ifndef EXPLORE_MEMORY_H
#define EXPLORE_MEMORY_H

/* What is written in the records beside their words of state, and payload, is data. */
static bool is_data(const shmr_word *word) {
    const shmr *h = ex_survivor();
    if (!h || !h->base || (const char *)word < h->base) return false;
    uint64_t at = (uint64_t)((const char *)word - h->base);
    if (at >= h->g.total) return false;
    if (at >= h->g.arena_at) return true;
    if (at < h->g.records_at || at >= h->g.records_at + h->g.config.blocks * sizeof(struct shmr_record)) return false;
    uint64_t field = (at - h->g.records_at) % sizeof(struct shmr_record);
    return field != offsetof(struct shmr_record, state) && field != offsetof(struct shmr_record, version) &&
           !(field >= offsetof(struct shmr_record, holders) && field < offsetof(struct shmr_record, references));
}

static bool acquires(int order) { return order == EX_ACQUIRE || order == EX_ACQ_REL || order == EX_SEQ_CST; }
static bool releases(int order) { return order == EX_RELEASE || order == EX_ACQ_REL || order == EX_SEQ_CST; }

static void forget_all(struct knowledge *k) { memset(k, 0, offsetof(struct knowledge, seen)); }

static uint16_t last_seen(const struct knowledge *k, uint16_t word) { return word < k->words ? k->seen[word] : 0; }

static void see(struct knowledge *k, uint16_t word, uint16_t stamp) {
    while (k->words <= word) k->seen[k->words++] = 0;
    if (stamp > k->seen[word]) k->seen[word] = stamp;
}

static void learn(struct knowledge *k, const struct knowledge *more) {
    if (more->sc_time > k->sc_time) k->sc_time = more->sc_time;
    for (int i = 0; i < EX_PROCESSES; i++)
        if (more->clock[i] > k->clock[i]) k->clock[i] = more->clock[i];
    uint16_t both = more->words < k->words ? more->words : k->words;
    for (int i = 0; i < both; i++)
        if (more->seen[i] > k->seen[i]) k->seen[i] = more->seen[i];
    if (more->words == both) return;
    memcpy(k->seen + both, more->seen + both, (size_t)(more->words - both) * sizeof *k->seen);
    k->words = more->words;
}

static void observe(uint64_t value) { processes[current].obs = mix(processes[current].obs, value); }

/* A write by p takes effect; `known` is what happened before it. */
static void put(struct process *p, const struct knowledge *known, struct cell *c, uint64_t value, int order, bool continues) {
    shmr_word *word = (shmr_word *)(uintptr_t)c->word;
    if (!weak) {
        memory_hash ^= mix((uintptr_t)word, word->value) ^ mix((uintptr_t)word, value);
        word->value = value;
        return;
    }
    if (!c->id) {
        if (next_id + 1 >= VIEW_WORDS) {
            fprintf(stderr, "the explorer's views are full\n");
            exit(2);
        }
        c->id = ++next_id;
    }
    if (message_count >= MESSAGES) ex_fail("more than %d messages in one run", MESSAGES);
    struct message *m = &messages[message_count], *before = c->newest ? &messages[c->newest - 1] : NULL;
    c->stamp++;
    see(&p->known, c->id, c->stamp);
    m->value = value;
    m->obs = p->obs;
    m->stamp = c->stamp;
    m->next = c->newest;
    m->released = releases(order);
    m->sc_at = order == EX_SEQ_CST ? ++sc_clock : 0;
    if (m->sc_at) p->known.sc_time = m->sc_at;
    forget_all(&m->passed);
    if (m->released) learn(&m->passed, known);
    see(&m->passed, c->id, c->stamp);
    if (continues && before) { /* a read-modify-write goes on with the release sequence */
        learn(&m->passed, &before->passed);
        m->released |= before->released;
    }
    memory_hash ^= mix(mix((uintptr_t)word, value), mix(p->obs, mix(c->stamp, m->sc_at)));
    c->newest = ++message_count;
    word->value = value;
}

/* What was written becomes visible "in a reasonable amount of time" (C11 7.17.3): by the time that a sleep ends. That orders nothing. */
static void show_everything(void) {
    for (uint32_t k = 0; weak && k < touched_count; k++) {
        const struct cell *c = &cells[touched[k]];
        for (int i = 0; c->id && i < process_count; i++) see(&processes[i].known, c->id, c->stamp);
    }
}

/* ---- late stores: what is written afterwards is there before, unless it is ordered ------------------------------------------ */

static void take_effect(struct process *p, int which) {
    struct late_store *late = &p->late[which];
    if (tracing) printf("  %td  a late store of %016llx takes effect\n", p - processes, (unsigned long long)late->value);
    late->cell->reserved = 0;
    put(p, &late->known, late->cell, late->value, late->order, late->continues);
    p->late_count--;
    for (int i = which; i < p->late_count; i++) p->late[i] = p->late[i + 1];
}

/* Whatever p has not yet written: before it releases, asks the kernel, or ends. */
static void settle(struct process *p) {
    while (p->late_count) take_effect(p, 0);
}

/* Before an access to a word: an own late store of it comes first, and a read-modify-write leaves no gap for others. */
static void settle_word(struct cell *c, bool write) {
    struct process *p = &processes[current];
    for (int i = p->late_count - 1; i >= 0; i--)
        if (p->late[i].cell == c || p->late[i].accesses-- == 0) take_effect(p, i);
    if (!write || !c->reserved) return;
    p = &processes[c->reserved - 1];
    for (int i = p->late_count - 1; i >= 0; i--)
        if (p->late[i].cell == c) take_effect(p, i);
}

static void write_word(struct cell *c, uint64_t value, int order, bool continues) {
    struct process *p = &processes[current];
    if (weak && releases(order)) settle(p);
    bool may_be_late = weak && left.late > 0 && p->late_count < LATE_MAX && (order == EX_RELAXED || order == EX_RELEASE);
    int accesses = may_be_late ? choose(WHEN, LATE_BY_MOST, lazy) : 0;
    if (accesses == 0) {
        put(p, &p->known, c, value, order, continues);
        return;
    }
    left.late--;
    observe(4);
    if (continues) c->reserved = (uint8_t)(current + 1);
    struct late_store *late = &p->late[p->late_count++];
    *late = (struct late_store){.cell = c, .value = value, .order = order, .continues = continues, .accesses = accesses};
    learn(&late->known, &p->known);
    if (tracing) printf("  %d  writes late\n", current);
}

/* Which message a load returns: NULL, the initial value. */
static const struct message *pick(struct cell *c, int order, bool must_be_newest, bool *other_than, uint64_t not_this) {
    struct process *p = &processes[current];
    uint16_t least = last_seen(&p->known, c->id);
    const struct message *choices[8];
    int count = 0;
    for (uint32_t link = c->newest; count < 8; link = messages[link - 1].next) {
        if (!link) { /* the initial value */
            if (least == 0) choices[count++] = NULL;
            break;
        }
        if (messages[link - 1].stamp < least) break;
        choices[count++] = &messages[link - 1];
        /* Its place is after all that this process knows to come before, and may be before all that it does not. */
        if (order == EX_SEQ_CST && messages[link - 1].sc_at && messages[link - 1].sc_at <= p->known.sc_time) break;
    }
    if (count == 0) return NULL; /* nothing was written in this run */
    if (must_be_newest || left.stale <= 0 || count == 1) return choices[0];
    if (other_than) { /* a failing compare-exchange may be stale, too, if it then fails */
        int kept = 1;
        for (int i = 1; i < count; i++)
            if ((choices[i] ? choices[i]->value : c->initial) != not_this) choices[kept++] = choices[i];
        count = kept;
    }
    int taken = choose(WHICH_MESSAGE, count, forgetful);
    if (taken) {
        left.stale--;
        ex_counts.stale++;
        if (tracing) printf("  %d  reads stale\n", current);
    }
    return choices[taken];
}

static void race(const struct cell *c, int other, const char *what, const struct ex_site *site) {
    const char *file = site ? strrchr(site->file, '/') : NULL;
    ex_fail("race: %s by process %d at %s:%d with process %d, word at %td", what, current,
            site ? (file ? file + 1 : site->file) : "payload", site ? site->line : 0, other, (const char *)c->word - region);
}

static void check_data(struct cell *c, bool write, const struct ex_site *site) {
    if (!weak || !c->data) return;
    struct process *p = &processes[current];
    if (c->last_writer && c->last_writer != current + 1 && c->written_at > p->known.clock[c->last_writer - 1])
        race(c, c->last_writer - 1, write ? "write after write" : "read after write", site);
    for (int i = 0; write && i < process_count; i++)
        if (i != current && c->read_at[i] > p->known.clock[i]) race(c, i, "write after read", site);
    if (write) {
        c->last_writer = (uint8_t)(current + 1);
        c->written_at = p->known.clock[current];
    } else {
        c->read_at[current] = p->known.clock[current];
    }
}

/* A sequentially consistent load has its place after the last such write that it saw, or saw the successors of. */
static void come_after(struct process *p, const struct message *m) {
    while (!m->sc_at && m->next) m = &messages[m->next - 1];
    if (m->sc_at > p->known.sc_time) p->known.sc_time = m->sc_at;
}

static uint64_t get(struct cell *c, int order, bool newest, bool *other_than, uint64_t not_this) {
    struct process *p = &processes[current];
    if (!weak) return c->word->value;
    const struct message *m = pick(c, order, newest, other_than, not_this);
    uint64_t value = m ? m->value : c->initial;
    if (m) {
        see(&p->known, c->id, m->stamp);
        if (acquires(order)) learn(&p->known, &m->passed);
        if (order == EX_SEQ_CST) come_after(p, m);
        observe(mix(m->obs, m->stamp));
    } else if (!c->id) {
        value = c->word->value;
    }
    return value;
}

uint64_t ex_load(const shmr_word *word, const struct ex_site *site) {
    if (current < 0) {
        note_check(word);
        return word->value;
    }
    struct cell *c = cell_of(word);
    step(c, false, site);
    processes[current].known.clock[current]++;
    check_data(c, false, site);
    settle_word(c, false);
    uint64_t value = get(c, site->order, false, NULL, 0);
    observe(value);
    trace("load", site, word, value);
    return value;
}

void ex_store(shmr_word *word, uint64_t value, const struct ex_site *site) {
    struct cell *c = cell_of(word);
    if (current < 0) {
        note_check(word);
        word->value = value;
        return;
    }
    step(c, true, site);
    processes[current].known.clock[current]++;
    check_data(c, true, site);
    settle_word(c, true);
    write_word(c, value, site->order, false);
    observe(0); /* it is one access further */
    trace("store", site, word, value);
}

bool ex_cas(shmr_word *word, uint64_t *expected, uint64_t desired, const struct ex_site *site) {
    struct cell *c = cell_of(word);
    if (current < 0) {
        note_check(word);
        bool equal = word->value == *expected;
        if (equal)
            word->value = desired;
        else
            *expected = word->value;
        return equal;
    }
    step(c, true, site);
    processes[current].known.clock[current]++;
    settle_word(c, true);
    bool may_fail = false, equal = word->value == *expected;
    uint64_t found = equal ? get(c, site->order, true, NULL, 0) : get(c, site->failure, false, &may_fail, *expected);
    observe(found);
    if (equal)
        write_word(c, desired, site->order, true);
    else
        *expected = found;
    trace(equal ? "cas" : "cas failed", site, word, equal ? desired : found);
    return equal;
}

uint64_t ex_rmw(shmr_word *word, uint64_t operand, const struct ex_site *site) {
    struct cell *c = cell_of(word);
    if (current >= 0) {
        step(c, true, site);
        processes[current].known.clock[current]++;
        settle_word(c, true);
    }
    uint64_t before = current < 0 ? word->value : get(c, site->order, true, NULL, 0), after = before;
    switch (site->verb) {
    case EX_ADD: after = before + operand; break;
    case EX_OR: after = before | operand; break;
    case EX_AND: after = before & operand; break;
    case EX_EXCHANGE: after = operand; break;
    }
    if (current < 0) {
        note_check(word);
        word->value = after;
        return before;
    }
    observe(before);
    write_word(c, after, site->order, true);
    trace("rmw", site, word, after);
    return before;
}

static struct ex_site plain = {"payload", "", 0, EX_LOAD, EX_RELAXED, EX_RELAXED, false};
uint64_t ex_data(const shmr_word *word) { return ex_load(word, &plain); }
void ex_set_data(shmr_word *word, uint64_t value) { ex_store(word, value, &plain); }

#endif
