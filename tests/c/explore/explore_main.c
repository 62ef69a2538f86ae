/* SPDX-License-Identifier: BSD-3-Clause */
/* explore [options] [SCENARIO ...]: play through small configurations of the real core.
 *
 *   --long             the larger limits of each scenario
 *   --limits P,K,T,I,L at most so many preemptions, kills, stale readings, interrupts, late stores
 *   --random N         N runs at random instead of all;  --seed S: begin with that one
 *   --seconds S        no longer than that, each scenario having an equal part
 *   --sites            list the accesses of the core
 *   --coverage         list those that never ran, and the changes before which nobody died
 *   --mutants N        weaken orders as the lines of standard input say; does anything go wrong in N runs of each scenario?
 *   --show             print every access of a run that fails
 */
#include "machine.h"

extern struct ex_site __start_ex_sites[], __stop_ex_sites[];

static bool long_form, show, coverage;
static uint64_t random_runs, mutant_runs, first_seed = 1;
static double seconds = 1e9;
static struct ex_limits given = {-1, 0, 0, 0, 0};
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
    printf("%-6s %-12s preemptions %d, kills %d, stale %d, interrupts %d, late %d: %9llu states, %9llu schedules, %9llu kills%s, %.1f s\n",
           ok ? "ok" : "FAILED", s->name, limits.preemptions, limits.kills, limits.stale, limits.interrupts, limits.late,
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

/* ---- mutants: the same core with weaker orders ---------------------------------------------------------------------------- */

static const char *const orders[] = {"relaxed", "acquire", "release", "acq_rel", "seq_cst"};
static const char *const verbs[] = {"load", "store", "cas", "add", "or", "and", "exchange"};

static void list_sites(void) {
    for (struct ex_site *s = __start_ex_sites; s < __stop_ex_sites; s++)
        if (strstr(s->file, "shmr_"))
            printf("%td %s %d %s %s %s\n", s - __start_ex_sites, s->file, s->line, s->function, verbs[s->verb], orders[s->order]);
}

struct mutant {
    char name[80];
    int sites, site[64], order[64];
    bool met;
    const char *caught_by;
    char how[200];
    uint64_t seed;
};

static int order_of(const char *name) {
    for (int i = 0; i < 5; i++)
        if (!strcmp(orders[i], name)) return i;
    return -1;
}

/* A line a mutant: NAME SITE:ORDER SITE:ORDER ... */
static bool read_mutant(struct mutant *m) {
    char line[4096], *rest = NULL;
    if (!fgets(line, sizeof line, stdin)) return false;
    char *word = strtok_r(line, " \n", &rest);
    if (!word) return false;
    snprintf(m->name, sizeof m->name, "%s", word);
    while ((word = strtok_r(NULL, " \n", &rest)) && m->sites < 64) {
        char *colon = strchr(word, ':');
        m->site[m->sites] = atoi(word);
        m->order[m->sites++] = colon ? order_of(colon + 1) : EX_RELAXED;
    }
    return true;
}

static void weaken(const struct mutant *m) {
    for (int i = 0; i < m->sites; i++) {
        struct ex_site *s = &__start_ex_sites[m->site[i]];
        int order = m->order[i];
        s->order = order;
        int load = order == EX_ACQ_REL ? EX_ACQUIRE : order == EX_RELEASE ? EX_RELAXED : order;
        if (s->failure > load) s->failure = load;
    }
}

static bool try_mutant(struct mutant *m, struct mutant *told) {
    static const struct ex_limits ways[] = {{99, 0, 30, 0, 0}, {99, 1, 30, 0, 30}, {99, 0, 30, 1, 30}, {99, 2, 30, 0, 30}};
    pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr)) _exit(2);
        weaken(m);
        for (int w = 0; w < 4; w++)
            if (!ex_random(&ways[w], mutant_runs, first_seed, &told->seed)) {
                snprintf(told->how, sizeof told->how, "%s", ex_failure());
                _exit(1);
            }
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    if (status == 0) return false;
    m->seed = told->seed;
    snprintf(m->how, sizeof m->how, "%s", WIFSIGNALED(status) ? "crash" : told->how);
    return true;
}

static bool has_met(const struct mutant *m) {
    for (int i = 0; i < m->sites; i++)
        if (__start_ex_sites[m->site[i]].met) return true;
    return false;
}

/* Prints a line for each: NAME, what became of it. Value: how many survived. */
static int run_mutants(void) {
    enum { MOST = 1024 };
    struct mutant *mutants = mmap(NULL, (MOST + 1) * sizeof *mutants, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int count = 0, survivors = 0;
    while (count < MOST && read_mutant(&mutants[count])) count++;
    for (int k = 0; ex_scenarios[k]; k++) {
        if (!is_wanted(ex_scenarios[k]->name)) continue;
        pid_t child = fork(); /* a scenario has a process for itself; so has each mutant, a fork of that */
        if (child == 0) {
            uint64_t none;
            ex_prepare(ex_scenarios[k]);
            ex_random(&(struct ex_limits){99, 1, 30, 1, 30}, 1000, first_seed, &none); /* which accesses it has */
            for (int i = 0; i < count; i++) {
                if (mutants[i].caught_by || !has_met(&mutants[i])) continue;
                mutants[i].met = true;
                if (try_mutant(&mutants[i], &mutants[MOST])) mutants[i].caught_by = ex_scenarios[k]->name;
            }
            _exit(0);
        }
        waitpid(child, NULL, 0);
    }
    for (int i = 0; i < count; i++) {
        struct mutant *m = &mutants[i];
        printf("%s %s", m->name, m->caught_by ? "caught" : m->met ? "survives" : "unmet");
        if (m->caught_by) printf(" %s %llu %s", m->caught_by, (unsigned long long)m->seed, m->how);
        printf("\n");
        survivors += !m->caught_by;
    }
    return survivors;
}

int main(int count, char **arguments) {
    int at = 1, bad = 0;
    for (; at < count && arguments[at][0] == '-'; at++) {
        const char *option = arguments[at];
        if (!strcmp(option, "--long")) long_form = true;
        else if (!strcmp(option, "--show")) show = true;
        else if (!strcmp(option, "--sites")) return list_sites(), 0;
        else if (!strcmp(option, "--coverage")) coverage = true;
        else if (++at >= count) return 2;
        else if (!strcmp(option, "--seconds")) seconds = atof(arguments[at]);
        else if (!strcmp(option, "--random")) random_runs = strtoull(arguments[at], NULL, 10);
        else if (!strcmp(option, "--mutants")) mutant_runs = strtoull(arguments[at], NULL, 10);
        else if (!strcmp(option, "--seed")) first_seed = strtoull(arguments[at], NULL, 10);
        else if (!strcmp(option, "--limits"))
            sscanf(arguments[at], "%d,%d,%d,%d,%d", &given.preemptions, &given.kills, &given.stale, &given.interrupts, &given.late);
        else return 2;
    }
    wanted = arguments + at;
    int scenarios = 0;
    for (int i = 0; ex_scenarios[i]; i++) scenarios += is_wanted(ex_scenarios[i]->name);
    if (scenarios) seconds /= scenarios;
    if (mutant_runs) return run_mutants() > 0;
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
    ex_print_sites(coverage);
    return bad;
}
