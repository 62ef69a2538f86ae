/* SPDX-License-Identifier: BSD-3-Clause */
/* The explorer's machine: coroutines, memory, time, schedules. See explore.h.
 *
 * Exploration is stateless: a run is replayed from the start up to the decision that differs, because the world (region,
 * private heaps, stacks) is put back by copying. A run that comes to a state from which everything was explored already
 * ends there. What a process will do is a function of what it has read so far; so a state is told by the values of all shared
 * words (with histories: by all messages), by a hash for each process of all it has read, and by the budgets left.
 */
#include <linux/futex.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <ucontext.h>

#include "explore.h"
#include "machine.h"

#define STACK_BYTES (128u << 10)
#define HEAP_BYTES (16u << 20)
#define CELLS 16384u        /* words ever touched: a power of two */
#define VIEW_WORDS 1536     /* words written in one run */
#define MESSAGES 8192       /* in one run */
#define DECISIONS 4096
#define STEPS_MAX 60000     /* of one run: beyond it somebody turns for ever */
#define SLICES_MAX 60       /* times that everybody slept through */
#define VISITED (1u << 23)
#define FIRST_PID 1000

/* ---- the world ------------------------------------------------------------------------------------------------ */

/* What happened before some point of a process, as far as it matters. */
struct knowledge {
    uint32_t sc_time;              /* sequentially consistent accesses come after that place in their order */
    uint32_t clock[EX_PROCESSES];
    uint16_t words;                /* so many of the following are meant */
    uint16_t seen[VIEW_WORDS];     /* of each word, the newest message; 0: none */
};

struct message {
    uint64_t value, obs;     /* obs: all that its writer had read */
    uint32_t next;           /* older one of the word */
    uint16_t stamp;
    bool released;
    uint32_t sc_at;          /* its place in the order of sequentially consistent writes; 0: it is none */
    struct knowledge passed; /* to who acquires it */
};

/* A store that takes effect later than it was made, though it does no harm to who made it. */
struct late_store {
    struct cell *cell;
    uint64_t value;
    int order;
    bool continues;
    int accesses; /* of who made it, until then */
    struct knowledge known;
};
#define LATE_MAX 8         /* of a process, at a time */
#define LATE_BY_MOST 100   /* accesses */

struct cell {
    const shmr_word *word;
    uint8_t readers, writers; /* in any run: a bit a process */
    bool data, shared;        /* written by one process and used by another: only there others may come in between */
    bool looked_at, checked;  /* read by the host, after a run: a death before its change makes a difference */
    /* of this run */
    uint32_t run;
    uint16_t id, stamp;            /* 0: not written yet */
    uint32_t newest;               /* message + 1 */
    uint64_t initial;
    uint8_t last_writer;           /* process + 1 */
    uint32_t written_at;
    uint32_t read_at[EX_PROCESSES];
    uint8_t reserved;              /* for a late read-modify-write of this process + 1 */
};

enum status { READY, ASLEEP, LOCKED_OUT, DONE, KILLED };

struct process {
    jmp_buf entry, context;
    char *stack;
    enum status status;
    shmr_word *word; /* asleep on it */
    bool woken;
    pthread_mutex_t *mutex;
    int64_t end;
    uint64_t obs;
    struct knowledge known;
    struct late_store late[LATE_MAX];
    int late_count;
    const struct ex_site *at;
};

static char heap[HEAP_BYTES] __attribute__((aligned(64)));
static size_t heap_used, heap_peak, heap_saved;
static char *heap_copy;
static char *region;

static struct cell cells[CELLS];
static uint32_t touched[CELLS];
static uint32_t touched_count, run_number = 1;
static struct message *messages;
static uint32_t message_count, sc_clock;
static uint16_t next_id;

static struct process processes[EX_PROCESSES];
static int process_count, current = -1, host_as = -1;
static jmp_buf host;
static int64_t now;
static uint64_t memory_hash, log_hash;
static int steps, slices;
static struct ex_limits left;
static int killed_count;
static bool newly_shared, failed, pruned, tracing, weak;
static char failure[512];
uint64_t ex_log[64];

static const struct ex_scenario *scenario;
struct ex_counts ex_counts;

/* ---- choices ---------------------------------------------------------------------------------------------------- */

static struct {
    uint8_t options, taken;
} trail[DECISIONS];
static int trail_length, replayed;
static bool randomly;
static uint64_t seed;
static unsigned busy, deadly, forgetful, lazy; /* one in so many chances, at random, is taken: of this run */

static struct visited {
    uint64_t hash;
    uint8_t preemptions, kills, stale, interrupts, late;
} *visited;
static uint32_t visited_count;

static uint64_t mix(uint64_t a, uint64_t b) {
    uint64_t z = (a ^ (b + UINT64_C(0x9e3779b97f4a7c15) + (a << 6) + (a >> 2))) * UINT64_C(0xbf58476d1ce4e5b9);
    z ^= z >> 29;
    z *= UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 32;
}

/* What a process has told the check becomes part of the state when it ends. */
static void note_log(void) {
    log_hash = 0;
    for (size_t i = 0; i < sizeof ex_log / sizeof *ex_log; i++) log_hash = mix(log_hash, ex_log[i]);
}

/* What is decided: one access may have several decisions, between which nothing is read. */
enum kind { WHO_BEGINS = 1, WHO_GOES_ON, AT_AN_ACCESS, GOING_ON, GOING_TO_SLEEP, WHICH_MESSAGE, WHEN, AT_THE_END };

static uint64_t state_hash(enum kind kind) {
    uint64_t hash = mix(mix(mix(memory_hash, kind), (uint64_t)now), log_hash);
    for (int i = 0; i < process_count; i++)
        hash = mix(hash, mix(processes[i].obs, (uint64_t)processes[i].status << 8 | (uint64_t)processes[i].woken << 1 | (uint64_t)(i == current)));
    return hash;
}

/* True if everything from here on was explored, with budgets at least as large. */
static bool seen_before(enum kind kind) {
    if (randomly) return false;
    uint64_t hash = state_hash(kind);
    for (uint32_t i = (uint32_t)(hash >> 20) & (VISITED - 1);; i = (i + 1) & (VISITED - 1)) {
        struct visited *v = &visited[i];
        if (v->hash == 0) {
            if (visited_count >= VISITED / 4 * 3) return false; /* full: go on without */
            visited_count++;
            ex_counts.states++;
            *v = (struct visited){hash, (uint8_t)left.preemptions, (uint8_t)left.kills, (uint8_t)left.stale,
                                  (uint8_t)left.interrupts, (uint8_t)left.late};
            return false;
        }
        if (v->hash != hash) continue;
        if (v->preemptions >= left.preemptions && v->kills >= left.kills && v->stale >= left.stale &&
            v->interrupts >= left.interrupts && v->late >= left.late)
            return true;
        if (v->preemptions <= left.preemptions && v->kills <= left.kills && v->stale <= left.stale &&
            v->interrupts <= left.interrupts && v->late <= left.late)
            *v = (struct visited){hash, (uint8_t)left.preemptions, (uint8_t)left.kills, (uint8_t)left.stale,
                                  (uint8_t)left.interrupts, (uint8_t)left.late};
        return false;
    }
}

static _Noreturn void to_host(void) { longjmp(host, 1); }

/* One of `options`, 0 being the ordinary one; at random, others are taken once in `rarity` times. */
static int choose(enum kind kind, int options, unsigned rarity) {
    if (options <= 1) return 0;
    if (randomly) {
        int taken = 0;
        if (replayed) {
            if (trail_length < replayed) taken = trail[trail_length].taken;
        } else if (next_random(&seed) % rarity == 0) {
            taken = 1 + (int)(next_random(&seed) % (unsigned)(options - 1));
        }
        if (trail_length >= DECISIONS) {
            ex_fail("more than %d decisions in one run", DECISIONS);
            return 0;
        }
        if (!replayed) trail[trail_length].taken = (uint8_t)taken;
        trail_length++;
        return taken;
    }
    if (trail_length < replayed) return trail[trail_length++].taken;
    if (seen_before(kind)) {
        pruned = true;
        to_host();
    }
    if (trail_length >= DECISIONS) {
        ex_fail("more than %d decisions in one run", DECISIONS);
        return 0;
    }
    trail[trail_length].options = (uint8_t)options;
    trail[trail_length].taken = 0;
    trail_length++;
    return 0;
}

void ex_fail(const char *format, ...) {
    if (!failed) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(failure, sizeof failure, format, arguments);
        va_end(arguments);
    }
    failed = true;
    if (current >= 0) to_host();
}

/* ---- cells --------------------------------------------------------------------------------------------------------- */

/* In explore_memory.h. */
static bool is_data(const shmr_word *word);
static void observe(uint64_t value);
static void take_effect(struct process *p, int which);
static void show_everything(void);

static struct cell *cell_of(const shmr_word *word) {
    uint32_t i = (uint32_t)(mix((uintptr_t)word >> 3, 0) & (CELLS - 1));
    while (cells[i].word && cells[i].word != word) i = (i + 1) & (CELLS - 1);
    struct cell *c = &cells[i];
    if (!c->word) {
        c->word = word;
        c->data = is_data(word);
    }
    if (c->run != run_number) {
        c->run = run_number;
        c->id = c->stamp = 0;
        c->newest = 0;
        c->last_writer = c->reserved = 0;
        memset(c->read_at, 0, sizeof c->read_at);
        c->initial = word->value;
        if (touched_count >= CELLS / 2) {
            fprintf(stderr, "the explorer's table of words is full\n");
            exit(2);
        }
        touched[touched_count++] = i;
    }
    return c;
}

/* That a word is shared is found out as runs go on. For a replay to meet the same decisions it counts only from the next pass. */
static void note_access(struct cell *c, bool write) {
    if (write)
        c->writers |= (uint8_t)(1 << current);
    else
        c->readers |= (uint8_t)(1 << current);
    uint8_t all = c->readers | c->writers;
    if (!c->shared && c->writers && (all & (all - 1))) newly_shared = true;
}

/* The host reads a word, or changes it, clearing up. */
static void note_check(const shmr_word *word) {
    uint32_t i = (uint32_t)(mix((uintptr_t)word >> 3, 0) & (CELLS - 1));
    while (cells[i].word && cells[i].word != word) i = (i + 1) & (CELLS - 1);
    if (!cells[i].word || cells[i].looked_at) return;
    cells[i].looked_at = true;
    if (cells[i].writers && !cells[i].shared) newly_shared = true;
}

static void begin_pass(void) {
    for (uint32_t i = 0; i < CELLS; i++) {
        uint8_t all = cells[i].readers | cells[i].writers;
        cells[i].checked = cells[i].writers && cells[i].looked_at;
        cells[i].shared = cells[i].writers && (all & (all - 1));
    }
    newly_shared = false;
}

/* ---- scheduling -------------------------------------------------------------------------------------------------------- */

/* Of each access in the core's sources, over all scenarios and their processes: how often it ran, and how often somebody died
 * there. */
extern struct ex_site __start_ex_sites[], __stop_ex_sites[];
static struct coverage {
    uint64_t ran, died;
} *coverage;

static void count_at(const struct ex_site *site, bool died) {
    if (!coverage || site < __start_ex_sites || site >= __stop_ex_sites) return;
    struct coverage *c = &coverage[site - __start_ex_sites];
    if (died)
        c->died++;
    else
        c->ran++;
}

static void trace(const char *what, const struct ex_site *site, const shmr_word *word, uint64_t value) {
    if (!tracing || current < 0) return;
    ptrdiff_t at = region ? (const char *)word - region : 0;
    const char *file = site ? strrchr(site->file, '/') : NULL;
    printf("  %d  %-10s %6td  %016llx  %s:%d %s\n", current, what, at, (unsigned long long)value,
           site ? (file ? file + 1 : site->file) : "-", site ? site->line : 0, site ? site->function : "");
}

static bool is_enabled(const struct process *p) {
    switch (p->status) {
    case READY: return true;
    case ASLEEP: return p->woken || p->end <= now;
    case LOCKED_OUT: return *(int *)p->mutex == 0;
    default: return false;
    }
}

static void resume(int process) {
    int before = current;
    if (process == before) return;
    current = process;
    if (_setjmp(processes[before].context) == 0) _longjmp(processes[process].context, 1);
}

/* The running process cannot go on: who does? Comes back when it is to go on itself. */
static void leave_to_others(void) {
    for (;;) {
        int enabled[EX_PROCESSES], count = 0;
        for (int i = 0; i < process_count; i++)
            if (is_enabled(&processes[i])) enabled[count++] = i;
        if (count) {
            int next = enabled[choose(WHO_GOES_ON, count, 2)];
            processes[next].status = READY;
            resume(next);
            return;
        }
        int64_t earliest = INT64_MAX;
        for (int i = 0; i < process_count; i++)
            if (processes[i].status == ASLEEP && processes[i].end < earliest) earliest = processes[i].end;
        if (earliest == INT64_MAX) to_host(); /* all have ended (or are locked out: the host looks) */
        if (++slices > SLICES_MAX) ex_fail("everybody sleeps, for ever");
        now = earliest;
        show_everything();
    }
}

/* What it had not yet written, by the word of the language, may or may not be there. */
static void perish(void) {
    struct process *p = &processes[current];
    while (p->late_count)
        if (choose(WHEN, 2, 2))
            p->late_count--;
        else
            take_effect(p, p->late_count - 1);
    if (p->at) count_at(p->at, true);
    if (tracing) printf("  %d  dies\n", current);
    p->status = KILLED;
    left.kills--;
    killed_count++;
    note_log();
    if (!weak) p->obs = 0; /* its private memory is gone; with histories, what it had seen still matters */
    leave_to_others();
    abort();
}

static void may_die(void) {
    if (left.kills > 0 && choose(GOING_ON, 2, deadly)) perish();
}

/* Before an access: another may go on, or this one may die. */
static void step(struct cell *c, bool write, const struct ex_site *site) {
    ((struct ex_site *)(uintptr_t)site)->met = true;
    if (++steps > STEPS_MAX) ex_fail("process %d turns for ever", current);
    note_access(c, write);
    count_at(site, false);
    if (!c->shared && !(c->checked && write)) return;
    processes[current].at = site;
    int others[EX_PROCESSES], count = 0, kill = left.kills > 0 && write;
    if (left.preemptions > 0 && c->shared)
        for (int i = 0; i < process_count; i++)
            if (i != current && is_enabled(&processes[i])) others[count++] = i;
    bool mortal = kill;
    if (randomly && kill) { /* with a likelihood of its own */
        if (choose(AT_AN_ACCESS, 2, deadly)) perish();
        kill = 0;
    }
    int taken = choose(AT_AN_ACCESS, 1 + kill + count, busy);
    if (taken == 0) return;
    if (kill && taken == 1) perish();
    left.preemptions--;
    int next = others[taken - 1 - kill];
    processes[next].status = READY;
    resume(next);
    if (mortal) may_die(); /* having stood there while others went on */
}

#include "explore_memory.h"
#include "explore_kernel.h"

/* ---- for scenarios --------------------------------------------------------------------------------------------------------------- */

void ex_be(int process) { host_as = process; }
int ex_me(void) { return current; }
bool ex_was_killed(int process) { return processes[process].status == KILLED; }
int ex_kills(void) { return killed_count; }

/* ---- runs -------------------------------------------------------------------------------------------------------------------------- */

static void coroutine(int i) {
    /* Each run comes back here: the frames above stay as they are. */
    if (_setjmp(processes[i].entry) == 0) to_host();
    observe(1); /* to have begun is different from not yet */
    scenario->script[i]();
    settle(&processes[i]);
    processes[i].status = DONE;
    note_log();
    leave_to_others();
    abort();
}

static void make_coroutine(int i) {
    struct process *p = &processes[i];
    ucontext_t context;
    p->stack = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    getcontext(&context);
    context.uc_stack.ss_sp = p->stack;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = NULL;
    makecontext(&context, (void (*)(void))coroutine, 1, i);
    if (setjmp(host) == 0) setcontext(&context);
}

static void put_back(void) {
    for (uint32_t i = 0; i < touched_count; i++) {
        struct cell *c = &cells[touched[i]];
        ((shmr_word *)(uintptr_t)c->word)->value = c->initial;
    }
    touched_count = 0;
    run_number++;
    memcpy(heap, heap_copy, heap_saved);
    if (heap_peak > heap_saved) memset(heap + heap_saved, 0, heap_peak - heap_saved);
    heap_used = heap_peak = heap_saved;
    message_count = sc_clock = 0;
    next_id = 0;
    now = 1000000000;
    memory_hash = log_hash = 0;
    steps = slices = killed_count = 0;
    failed = pruned = false;
    memset(ex_log, 0, sizeof ex_log);
    for (int i = 0; i < process_count; i++) {
        struct process *p = &processes[i];
        p->status = READY;
        p->woken = false;
        p->at = NULL;
        p->obs = (uint64_t)i;
        p->late_count = 0;
        memcpy(p->context, p->entry, sizeof p->context);
        forget_all(&p->known);
    }
}

static void run_once(const struct ex_limits *limits) {
    put_back();
    left = *limits;
    weak = limits->stale > 0;
    trail_length = 0;
    ex_failed_checks(true);
    current = -1;
    if (setjmp(host) == 0) {
        int first = choose(WHO_BEGINS, process_count, 2);
        current = first;
        _longjmp(processes[first].context, 1);
    }
    current = -1;
    ex_counts.runs++;
    if (pruned) return;
    ex_counts.killed += killed_count > 0;
    if (!failed)
        for (int i = 0; i < process_count; i++)
            if (processes[i].status != DONE && processes[i].status != KILLED) ex_fail("process %d is stuck", i);
    if (!failed && !(trail_length >= replayed && seen_before(AT_THE_END))) scenario->check();
    if (!failed && ex_failed_checks(false)) ex_fail("a check failed (above)");
}

bool ex_prepare(const struct ex_scenario *which) {
    scenario = which;
    process_count = which->processes;
    if (!heap_copy) heap_copy = malloc(HEAP_BYTES);
    if (!visited) visited = calloc(VISITED, sizeof *visited);
    if (!messages) messages = calloc(MESSAGES, sizeof *messages);
    if (!heap_copy || !visited || !messages) return false;
    memset(visited, 0, VISITED * sizeof *visited);
    memset(cells, 0, sizeof cells);
    memset(heap, 0, heap_peak);
    heap_used = heap_peak = 0;
    touched_count = visited_count = 0;
    region = NULL;
    current = -1;
    now = 1000000000;
    which->setup();
    ex_be(-1);
    touched_count = 0;
    run_number++;
    heap_saved = heap_used;
    memcpy(heap_copy, heap, heap_saved);
    for (int i = 0; i < process_count; i++) make_coroutine(i);
    memset(&ex_counts, 0, sizeof ex_counts);
    return true;
}

/* `count` runs, each chosen at random. False: one failed. */
bool ex_random(const struct ex_limits *limits, uint64_t count, uint64_t first_seed, uint64_t *failed_seed) {
    randomly = true;
    replayed = 0;
    for (uint64_t i = 0; i < count; i++) {
        if (newly_shared) begin_pass();
        seed = first_seed + i;
        static const unsigned rarities[4][3] = {{2, 6, 25}, {8, 40, 150}, {1, 2, 6}, {1, 4, 16}};
        busy = rarities[0][random_below(&seed, 3)];
        deadly = rarities[1][random_below(&seed, 3)];
        forgetful = rarities[2][random_below(&seed, 3)];
        lazy = rarities[3][random_below(&seed, 3)];
        run_once(limits);
        if (failed) {
            *failed_seed = first_seed + i;
            return false;
        }
    }
    return true;
}

/* Every schedule within the limits, unless the time is over. */
bool ex_everything(const struct ex_limits *limits, double seconds, bool *complete) {
    struct timespec begin, time;
    uint64_t failed_seed;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    *complete = true;
    if (!ex_random(limits, 2000, 1, &failed_seed)) return false; /* to learn which words are shared */
    do {
        memset(visited, 0, VISITED * sizeof *visited);
        visited_count = 0;
        memset(&ex_counts, 0, sizeof ex_counts);
        begin_pass();
        randomly = false;
        replayed = 0;
        for (;;) {
            run_once(limits);
            if (failed) return false;
            if (newly_shared) break; /* once more from the start */
            while (trail_length > 0 && trail[trail_length - 1].taken + 1 >= trail[trail_length - 1].options) trail_length--;
            if (trail_length == 0) break;
            trail[trail_length - 1].taken++;
            replayed = trail_length;
            clock_gettime(CLOCK_MONOTONIC, &time);
            if ((double)(time.tv_sec - begin.tv_sec) + (double)(time.tv_nsec - begin.tv_nsec) * 1e-9 > seconds) {
                *complete = false;
                return true;
            }
        }
    } while (newly_shared);
    return true;
}

/* The run that failed once more, with every access printed. */
void ex_show(const struct ex_limits *limits) {
    char what[sizeof failure];
    memcpy(what, failure, sizeof what);
    replayed = trail_length;
    if (replayed == 0) replayed = 1;
    tracing = true;
    run_once(limits);
    tracing = false;
    printf("  %s\n", what);
}

/* ---- coverage --------------------------------------------------------------------------------------------------------------- */

void ex_count_sites(void) {
    size_t count = (size_t)(__stop_ex_sites - __start_ex_sites);
    void *shared = mmap(NULL, count * sizeof *coverage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    coverage = shared == MAP_FAILED ? NULL : shared;
}

void ex_print_sites(bool all) {
    unsigned count = 0, ran = 0, changes = 0, died = 0;
    if (!coverage) return;
    for (const struct ex_site *s = __start_ex_sites; s < __stop_ex_sites; s++) {
        const char *file = strrchr(s->file, '/') ? strrchr(s->file, '/') + 1 : s->file;
        if (strncmp(file, "shmr_", 5) != 0) continue;
        const struct coverage *c = &coverage[s - __start_ex_sites];
        bool change = c->ran && s->verb != EX_LOAD;
        count++;
        ran += c->ran > 0;
        changes += change;
        died += change && c->died;
        if (all && !c->ran) printf("never ran: %s:%d %s\n", file, s->line, s->function);
        if (all && change && !c->died) printf("nobody died at: %s:%d %s\n", file, s->line, s->function);
    }
    printf("%u of the core's %u accesses ran; of %u that change something, somebody died before %u\n", ran, count, changes, died);
}

const char *ex_failure(void) { return failure; }
