/* SPDX-License-Identifier: BSD-3-Clause */
// Explicit-state exploration, shared by the protocol models.
//
// A model is a class with
//
//   using State = ...;                        only u8 members, no padding
//   State initial() const;
//   int processes() const;
//   int choices(const State &, int p) const;  how many alternatives the next step of p has (at least 1)
//   bool step(State &, int p, int choice, const char *&error) const;   false: p cannot move
//   bool kill(State &, int p) const;          false: p cannot be killed here
//   bool expire(State &, int p) const;        false: p has no timeout that could run out here
//   void normalise(State &) const;            clears what can no longer matter
//   bool good(const State &) const;           the run may end here
//   std::string describe(const State &, int p) const;
//
// One step is at most one shared atomic access. All interleavings are explored breadth first under sequential
// consistency, with a SIGKILL possible before each step: a killed process never runs again, and that is
// exactly what shared memory sees of a SIGKILL. Two kinds of fault are reported, each with a shortest trace:
//
//   VIOLATION   a step broke an invariant
//   STUCK       from some reachable state no good state is reachable any more (lost message, lost wake-up,
//   leak)
#pragma once

#include <sys/resource.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

using u8 = std::uint8_t;

// For a list STEPS(X) of step names: their enumeration, and their texts.
#define EXPLORE_NAME(name) name,
#define EXPLORE_STRING(name) #name,

namespace explore {

constexpr std::uint32_t NONE = ~std::uint32_t{0};

struct Outcome {
    std::size_t states = 0, steps = 0, stuck = 0;
    bool capped = false;
    std::string error;
    std::vector<std::string> trace;

    bool clean() const { return error.empty() && stuck == 0 && !capped; }
    bool faulty() const { return !error.empty() || stuck != 0; }
};

// States numbered in the order of discovery; chunks, so that growing never copies them.
template <class State> class Store {
    static constexpr std::size_t CHUNK = 1 << 14;
    struct Entry {
        std::uint32_t hash, id;
    };
    std::vector<std::unique_ptr<State[]>> chunks_;
    std::vector<Entry> table_ = std::vector<Entry>(1 << 12, Entry{0, NONE});
    std::size_t size_ = 0;

    static std::uint32_t hash(const State &s) {
        const char *bytes = reinterpret_cast<const char *>(&s);
        std::uint64_t h = 0x9e3779b97f4a7c15u;
        for (std::size_t i = 0; i < sizeof(State); i += 8) {
            std::uint64_t word = 0;
            std::memcpy(&word, bytes + i, i + 8 <= sizeof(State) ? 8 : sizeof(State) - i);
            h = (h ^ word) * 0xff51afd7ed558ccdu;
            h ^= h >> 32;
        }
        return static_cast<std::uint32_t>(h ^ (h >> 29));
    }
    void grow() {
        std::vector<Entry> bigger(table_.size() * 2, Entry{0, NONE});
        for (const Entry &e : table_) {
            if (e.id == NONE) continue;
            std::size_t i = e.hash & (bigger.size() - 1);
            while (bigger[i].id != NONE) i = (i + 1) & (bigger.size() - 1);
            bigger[i] = e;
        }
        table_.swap(bigger);
    }

  public:
    std::size_t size() const { return size_; }
    const State &operator[](std::size_t id) const { return chunks_[id / CHUNK][id % CHUNK]; }

    std::uint32_t insert(const State &s, bool &is_new) {
        if (2 * size_ >= table_.size()) grow();
        const std::uint32_t h = hash(s);
        std::size_t i = h & (table_.size() - 1);
        for (; table_[i].id != NONE; i = (i + 1) & (table_.size() - 1))
            if (table_[i].hash == h && !std::memcmp(&(*this)[table_[i].id], &s, sizeof s)) {
                is_new = false;
                return table_[i].id;
            }
        is_new = true;
        if (size_ % CHUNK == 0) chunks_.emplace_back(new State[CHUNK]);
        chunks_[size_ / CHUNK][size_ % CHUNK] = s;
        table_[i] = Entry{h, static_cast<std::uint32_t>(size_)};
        return static_cast<std::uint32_t>(size_++);
    }
};

template <class Model> Outcome run(const Model &model, std::size_t max_states) {
    using State = typename Model::State;
    static_assert(std::has_unique_object_representations_v<State>, "padding would make equal states differ");
    enum : u8 { STEP, KILL, EXPIRE };
    struct Origin {
        std::uint32_t from;
        u8 process, how;
    };

    Outcome out;
    Store<State> states;
    std::vector<Origin> origin;
    std::vector<std::uint32_t>
        successor;   // the successors of i are successor[first[i]] .. successor[first[i + 1]]
    std::vector<std::uint32_t> first;

    auto add = [&](State &s, std::uint32_t from, int p, u8 how) {
        model.normalise(s);
        bool is_new;
        const std::uint32_t id = states.insert(s, is_new);
        if (is_new) origin.push_back({from, static_cast<u8>(p), how});
        if (from != NONE && id != from) successor.push_back(id);
    };
    auto trace_to = [&](std::uint32_t id) {
        std::vector<std::string> lines;
        for (; origin[id].from != NONE; id = origin[id].from) {
            const Origin &o = origin[id];
            const char *prefix = o.how == KILL ? "SIGKILL " : o.how == EXPIRE ? "timeout " : "";
            lines.push_back(prefix + model.describe(states[o.from], o.process));
        }
        return std::vector<std::string>(lines.rbegin(), lines.rend());
    };

    State start = model.initial();
    add(start, NONE, 0, STEP);
    for (std::uint32_t i = 0; i < states.size(); i++) {
        first.push_back(static_cast<std::uint32_t>(successor.size()));
        if (states.size() > max_states) {
            out.capped = true;
            out.states = states.size();
            return out;
        }
        for (int p = 0; p < model.processes(); p++) {
            const int n = model.choices(states[i], p);
            for (int choice = 0; choice < n; choice++) {
                State s = states[i];
                const char *error = nullptr;
                if (!model.step(s, p, choice, error)) continue;
                if (error) {
                    out.error = error;
                    out.trace = trace_to(i);
                    out.trace.push_back(model.describe(states[i], p) + "   <-- " + error);
                    out.states = states.size();
                    return out;
                }
                add(s, i, p, STEP);
            }
            State s = states[i];
            if (model.kill(s, p)) add(s, i, p, KILL);
            s = states[i];
            if (model.expire(s, p)) add(s, i, p, EXPIRE);
        }
    }
    first.push_back(static_cast<std::uint32_t>(successor.size()));
    out.states = states.size();
    out.steps = successor.size();

    // From which states can the run still end well? Most successors have higher numbers: a few sweeps do.
    std::vector<u8> ends_well(states.size());
    for (std::size_t i = 0; i < states.size(); i++) ends_well[i] = model.good(states[i]);
    for (bool changed = true; changed;) {
        changed = false;
        for (std::size_t i = states.size(); i-- > 0;)
            for (std::uint32_t k = first[i]; !ends_well[i] && k < first[i + 1]; k++)
                if (ends_well[successor[k]]) ends_well[i] = changed = true;
    }
    for (std::size_t i = 0; i < states.size(); i++) {
        if (ends_well[i]) continue;
        if (out.stuck++ == 0) out.trace = trace_to(static_cast<std::uint32_t>(i));
    }
    return out;
}

// ---- command line: quick | long | trace WORD ----------------------------------------------------------
enum class Suite { QUICK, LONG };

template <class Config> struct Case {
    const char *name;
    Suite suite;
    Config config;   // config.bug == 0: must be clean; otherwise the planted bug must be found
};

inline std::string with_commas(std::size_t n) {
    std::string s = std::to_string(n);
    for (int i = static_cast<int>(s.size()) - 3; i > 0; i -= 3) s.insert(static_cast<std::size_t>(i), ",");
    return s;
}

// Prints one table row per case; returns the process exit status.
template <class Model, class Config>
int main_of(const char *model_name, const std::vector<Case<Config>> &cases, int argc, char **argv) {
    const std::string verb = argc > 1 ? argv[1] : "quick";
    const std::string word = argc > 2 ? argv[2] : "";
    const bool trace = verb == "trace";
    if (verb != "quick" && verb != "long" && !trace) {
        std::fprintf(stderr, "usage: %s quick | long | trace WORD\n", argv[0]);
        return 2;
    }
    constexpr std::size_t MAX_STATES = 60'000'000;
    const auto now = [] { return std::chrono::steady_clock::now(); };
    const auto seconds_since = [&](auto t) { return std::chrono::duration<double>(now() - t).count(); };
    const auto same = [](const Config &a, const Config &b) { return !std::memcmp(&a, &b, sizeof a); };
    static_assert(std::has_unique_object_representations_v<Config>);

    std::vector<Config> known_clean;
    int failures = 0;
    const auto t0 = now();
    for (const auto &c : cases) {
        const std::string name = c.name;
        if (trace ? name.find(word) == std::string::npos : (c.suite == Suite::LONG) != (verb == "long"))
            continue;
        const auto t1 = now();
        const Outcome out = run(Model{c.config}, MAX_STATES);
        const bool planted = c.config.bug != 0;
        bool as_expected = planted ? out.faulty() : out.clean();

        std::string result = "none";
        if (out.capped) result = "not finished";
        if (!out.error.empty())
            result = "VIOLATION after " + std::to_string(out.trace.size()) + " steps: " + out.error;
        if (out.stuck) result = "STUCK after " + std::to_string(out.trace.size()) + " steps";
        if (planted && !out.faulty()) result = "NOT FOUND";

        // A planted bug counts only if it is the bug that was found: the same configuration must be clean
        // without it.
        Config sound = c.config;
        sound.bug = {};
        bool known = false;
        for (const Config &k : known_clean) known = known || same(k, sound);
        if (planted && !trace && !known && !run(Model{sound}, MAX_STATES).clean()) {
            result += " (but faulty without the bug, too)";
            as_expected = false;
        }
        if (as_expected && !known) known_clean.push_back(sound);

        failures += !as_expected;
        std::printf("| %s | %s%s | %s | %s%s |\n", model_name, planted ? "*planted:* " : "", c.name,
                    with_commas(out.states).c_str(), result.c_str(), as_expected ? "" : " **UNEXPECTED**");
        std::fflush(stdout);
        std::fprintf(stderr, "  %6.2f s  %s\n", seconds_since(t1), c.name);
        if (trace || !as_expected)
            for (const auto &line : out.trace)
                std::fprintf(trace ? stdout : stderr, "      %s\n", line.c_str());
    }
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    std::fprintf(stderr, "%s: %.1f s, peak %ld MiB, %d unexpected\n", model_name, seconds_since(t0),
                 usage.ru_maxrss / 1024, failures);
    return failures != 0;
}

}   // namespace explore
