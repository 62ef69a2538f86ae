/* SPDX-License-Identifier: BSD-3-Clause */
/* explore [options] [SCENARIO ...]: play through small configurations of the real core.
 *
 *   --long             the larger limits of each scenario
 *   --limits P,K,T,I   at most so many preemptions, kills, stale readings, interrupts
 *   --random N         N runs at random instead of all;  --seed S: begin with that one
 *   --seconds S        no longer than that for each scenario
 *   --mutants N        weaken each ordered access by a step, and try N runs of each scenario to notice
 *   --sites            list the accesses that never ran, and the changes before which nobody died
 *   --show             print every access of a run that fails
 */
#include "machine.h"

extern struct ex_site __start_ex_sites[], __stop_ex_sites[];

static bool long_form, show, list_sites;
static uint64_t random_runs, mutant_runs, first_seed = 1;
static double seconds = 1e9;
static struct ex_limits given = {-1, 0, 0, 0};
static char **wanted;

static double clock_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static bool is_wanted(const char *name) {
    if (!*wanted) return true;
    for (char **w = wanted; *w; w++)
        if (!strcmp(*w, name)) return true;
    return false;
}

static int explore(const struct ex_scenario *s) {
    struct ex_limits limits = given.preemptions >= 0 ? given : long_form ? s->long_ : s->quick;
    double begin = clock_now();
    ex_prepare(s);
    uint64_t failed_seed = 0;
    bool complete = true, ok = random_runs ? ex_random(&limits, random_runs, first_seed, &failed_seed)
                                           : ex_everything(&limits, seconds, &complete);
    printf("%-6s %-12s preemptions %d, kills %d, stale %d, interrupts %d: %9llu states, %9llu schedules, %9llu kills%s, %.1f s\n",
           ok ? "ok" : "FAILED", s->name, limits.preemptions, limits.kills, limits.stale, limits.interrupts,
           (unsigned long long)ex_counts.states, (unsigned long long)ex_counts.runs, (unsigned long long)ex_counts.killed,
           complete ? "" : " (not all)", clock_now() - begin);
    if (!ok) {
        printf("  %s", ex_failure());
        if (random_runs) printf(" (seed %llu)", (unsigned long long)failed_seed);
        printf("\n");
        if (show) ex_show(&limits);
    }
    fflush(stdout);
    return !ok;
}

/* ---- mutants -------------------------------------------------------------------------------------------------------- */

static const char *const orders[] = {"relaxed", "acquire", "release", "acq_rel", "seq_cst"};
static const char *const verbs[] = {"load", "store", "cas", "add", "or", "and", "exchange"};

struct mutant {
    struct ex_site *site;
    int order, failure;
    const char *caught_by;
    char how[120];
    uint64_t seed;
};

static int weaken(struct ex_site *s, struct mutant out[2]) {
    bool loads = s->verb == EX_LOAD, cas = s->verb == EX_CAS;
    switch (s->order) {
    case EX_SEQ_CST:
        out[0] = (struct mutant){.site = s, .order = loads ? EX_ACQUIRE : EX_ACQ_REL, .failure = cas ? EX_ACQUIRE : 0};
        return 1;
    case EX_ACQ_REL:
        out[0] = (struct mutant){.site = s, .order = EX_ACQUIRE, .failure = EX_ACQUIRE};
        out[1] = (struct mutant){.site = s, .order = EX_RELEASE, .failure = EX_RELAXED};
        return 2;
    case EX_ACQUIRE:
    case EX_RELEASE: out[0] = (struct mutant){.site = s, .order = EX_RELAXED, .failure = EX_RELAXED}; return 1;
    default: return 0;
    }
}

static void try_mutants(struct mutant *mutants, int count) {
    static const struct ex_limits ways[] = {{99, 0, 3, 0}, {99, 1, 3, 0}, {99, 0, 1, 1}};
    struct told {
        uint64_t seed;
        char how[120];
    } *told = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int k = 0; ex_scenarios[k]; k++) {
        if (!is_wanted(ex_scenarios[k]->name)) continue;
        pid_t child = fork(); /* a scenario has a process for itself; so has each mutant, a fork of that */
        if (child) {
            int status;
            waitpid(child, &status, 0);
            continue;
        }
        ex_prepare(ex_scenarios[k]);
        for (int i = 0; i < count; i++) {
            if (mutants[i].caught_by) continue;
            memset(told, 0, sizeof *told);
            child = fork();
            if (child == 0) {
                if (!freopen("/dev/null", "w", stderr)) _exit(2);
                mutants[i].site->order = mutants[i].order;
                mutants[i].site->failure = mutants[i].failure;
                for (int w = 0; w < 3; w++)
                    if (!ex_random(&ways[w], mutant_runs, first_seed, &told->seed)) {
                        snprintf(told->how, sizeof told->how, "%d kills: %s", ways[w].kills, ex_failure());
                        _exit(1);
                    }
                _exit(0);
            }
            int status;
            waitpid(child, &status, 0);
            if (status == 0) continue;
            mutants[i].caught_by = ex_scenarios[k]->name;
            mutants[i].seed = told->seed;
            snprintf(mutants[i].how, sizeof mutants[i].how, "%s", WIFSIGNALED(status) ? "crash" : told->how);
        }
        _exit(0);
    }
}

static int run_mutants(void) {
    size_t sites = (size_t)(__stop_ex_sites - __start_ex_sites);
    struct mutant *mutants = mmap(NULL, 2 * sites * sizeof *mutants + 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int count = 0, survivors = 0;
    for (size_t i = 0; i < sites; i++)
        if (strstr(__start_ex_sites[i].file, "csrc/")) count += weaken(&__start_ex_sites[i], mutants + count);
    try_mutants(mutants, count);
    for (int i = 0; i < count; i++) {
        struct mutant *m = &mutants[i];
        const char *file = strrchr(m->site->file, '/') + 1;
        printf("%-8s %s:%d %s: %s %s -> %s", m->caught_by ? "caught" : "SURVIVES", file, m->site->line, m->site->function,
               verbs[m->site->verb], orders[m->site->written], orders[m->order]);
        if (m->caught_by) printf("  by %s, seed %llu: %s", m->caught_by, (unsigned long long)m->seed, m->how);
        printf("\n");
        survivors += !m->caught_by;
    }
    printf("%d mutants, %d survive\n", count, survivors);
    return survivors;
}

int main(int count, char **arguments) {
    int at = 1, bad = 0;
    for (; at < count && arguments[at][0] == '-'; at++) {
        const char *option = arguments[at];
        if (!strcmp(option, "--long")) long_form = true;
        else if (!strcmp(option, "--show")) show = true;
        else if (!strcmp(option, "--sites")) list_sites = true;
        else if (++at >= count) return 2;
        else if (!strcmp(option, "--seconds")) seconds = atof(arguments[at]);
        else if (!strcmp(option, "--random")) random_runs = strtoull(arguments[at], NULL, 10);
        else if (!strcmp(option, "--mutants")) mutant_runs = strtoull(arguments[at], NULL, 10);
        else if (!strcmp(option, "--seed")) first_seed = strtoull(arguments[at], NULL, 10);
        else if (!strcmp(option, "--limits"))
            sscanf(arguments[at], "%d,%d,%d,%d", &given.preemptions, &given.kills, &given.stale, &given.interrupts);
        else return 2;
    }
    wanted = arguments + at;
    if (mutant_runs) return run_mutants();
    ex_count_sites();
    for (int i = 0; ex_scenarios[i]; i++) {
        if (!is_wanted(ex_scenarios[i]->name)) continue;
        pid_t child = fork(); /* a world of its own */
        if (child == 0) _exit(explore(ex_scenarios[i]));
        int status;
        waitpid(child, &status, 0);
        if (WIFSIGNALED(status)) printf("FAILED %s: signal %d\n", ex_scenarios[i]->name, WTERMSIG(status));
        bad |= status != 0;
    }
    ex_print_sites(list_sites);
    return bad;
}
