"""Planted bugs: each weakens one rule of the core, by replacing a few lines of its sources, and must be found.

Only what is replaced stands here; `plants.py` builds and runs them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plant:
    """One bug.

    Attributes
    ----------
    name
        What the switch is called: ``make plants PLANT=name``.
    rule
        What it breaks: an invariant or a label of csrc/README.md.
    what
        What is done wrong, for the table.
    file
        The source of csrc/ that is changed.
    changes
        Pairs of texts, each of which stands there exactly once, and what takes its place.
    scenario
        Where the explorer must find it.
    limits
        Preemptions, deaths, stale readings, interrupts; none: the quick ones of the scenario.
    runs
        So many at random; 0: all of them, in order.
    """

    name: str
    rule: str
    what: str
    file: str
    changes: tuple[tuple[str, str], ...]
    scenario: str
    limits: str = ""
    runs: int = 0


RING, BLOCK, WAIT, RECOVER, ARENA = (
    "shmr_ring.c",
    "shmr_block.c",
    "shmr_wait.c",
    "shmr_recover.c",
    "shmr_arena.c",
)

COMMIT = """\
    if (!shmr_cas_acq_rel(&r->state, &expected, committed)) { /* R1 */
        pthread_mutex_unlock(&h->commit_lock[c->ring]);
        return SHMR_STALE;
    }
"""
INSERT = "    status = shmr_insert(h, c->ring, b->block, generation, h->g.config.capacity[c->ring]);\n"
LOOK_AGAIN = """\
        status = attempt(h, argument);
        if (status != SHMR_WOULD_BLOCK) {
            if (lost"""

PLANTS = (
    # --- the ring; the first four are those of the earliest model
    Plant(
        "slot-before-state",
        "R3",
        "commit fills the slot before the block is COMMITTED",
        RING,
        ((COMMIT + INSERT, INSERT + COMMIT),),
        "one_to_one",
    ),
    Plant(
        "cursor-before-lease",
        "I6",
        "lease advances its cursor before the block is its own",
        RING,
        (
            (
                "        uint64_t mine = shmr_state_pack(shmr_state_generation(seen), h->self, ring,",
                "        advance_lease_cursor(h, ring, first);\n"
                "        uint64_t mine = shmr_state_pack(shmr_state_generation(seen), h->self, ring,",
            ),
        ),
        "two_by_two",
    ),
    Plant(
        "orphans-ignored",
        "I7",
        "recovery leaves a COMMITTED block that is in no slot as it is",
        RECOVER,
        (("    case SHMR_COMMITTED:\n        if (ring >=", "    case SHMR_COMMITTED:\n        if (true || ring >="),),
        "one_to_one",
    ),
    Plant(
        "generation-ignored",
        "I2",
        "whether a slot's block waits is told without its generation",
        RING,
        (
            (
                "    return shmr_state_kind(*state) == SHMR_COMMITTED && shmr_state_ring(*state) == ring &&\n"
                "           (shmr_state_generation(*state) & SHMR_SLOT_GENERATION_MASK) == shmr_slot_generation(slot);",
                "    return shmr_state_kind(*state) == SHMR_COMMITTED && shmr_state_ring(*state) == ring;",
            ),
        ),
        "reused",
    ),
    Plant(
        "generation-stays",
        "I2",
        "commit does not count the generation",
        RING,
        (
            (
                "generation = shmr_state_generation(b->state) + 1; /* I2 */",
                "generation = shmr_state_generation(b->state);",
            ),
        ),
        "reused",
    ),
    Plant(
        "cycle-ignored",
        "I5",
        "insert fills whatever slot the cursor named, even if it has been filled for a later cycle",
        RING,
        (("        if (shmr_slot_cycle(seen) != ((cycle - 1) & SHMR_CYCLE_MASK)) continue;", ""),),
        "lapped",
    ),
    Plant(
        "cursor-ahead",
        "I5",
        "commit advances its cursor before the slot is filled",
        RING,
        (
            (
                "        if (shmr_cas_seq_cst(at, &seen, shmr_slot_pack(cycle, generation, block))) {",
                "        uint64_t early = position;\n"
                "        shmr_cas_acq_rel(&q->commit_cursor, &early, position + 1);\n"
                "        if (shmr_cas_seq_cst(at, &seen, shmr_slot_pack(cycle, generation, block))) {",
            ),
        ),
        "one_to_one",
    ),
    Plant(
        "advance-silent",
        "S5",
        "whoever advances the cursor of leases notifies nobody",
        RING,
        (("        shmr_notify_one(h, q->slot_waiters);\n", "        (void)h;\n"),),
        "full",
    ),
    Plant(
        "helper-silent",
        "S5",
        "a consumer that advances the cursor for another notifies nobody",
        RING,
        (
            (
                "            advance_lease_cursor(h, ring, first); /* help: taken already */",
                "            shmr_cas_seq_cst(&q->lease_cursor, &first, first + 1);",
            ),
        ),
        "helped",
    ),
    Plant(
        "full-keeps-committed",
        "I7",
        "a commit that finds the ring full leaves its block COMMITTED while it waits",
        RING,
        (("        shmr_cas_acq_rel(&r->state, &committed, b->state); /* R1 */", "        b->state = committed;"),),
        "full",
    ),
    Plant(
        "full-forgets-the-lease",
        "I7",
        "a leased block that finds its ring full is taken back as if it had been claimed",
        RING,
        (
            (
                "                                   shmr_state_kind(b->state)); /* a lease",
                "                                   SHMR_CLAIMED); /* a lease",
            ),
        ),
        "put_back",
    ),
    Plant(
        "closed-after-the-look",
        "R9",
        "lease looks whether the ring is closed after it has found it empty",
        RING,
        (
            (
                "    bool closed = shmr_load_seq_cst(&q->closed); /* S6 A9: first, so that what was committed before is found */\n",
                "",
            ),
            (
                "    if (status == SHMR_WOULD_BLOCK && closed) return SHMR_CLOSED;",
                "    if (status == SHMR_WOULD_BLOCK && shmr_load_seq_cst(&q->closed)) return SHMR_CLOSED;",
            ),
        ),
        "finish",
    ),
    Plant(
        "idle-without-second-look",
        "S2",
        "a ring is found idle although something was committed during the look at its blocks",
        RING,
        (
            (
                "    return shmr_load_seq_cst(shmr_slot_at(h, ring, position)) == before ? SHMR_OK : SHMR_WOULD_BLOCK; /* S2 A3 */",
                "    (void)before;\n    return SHMR_OK;",
            ),
        ),
        "idle",
    ),
    # --- waiting; the first four are those of the earliest models
    Plant(
        "no-second-look",
        "I9",
        "a waiter looks before it registers, and not after",
        WAIT,
        (
            (
                "        bool ask = doorbell < 0 && watching_space;\n",
                "        bool ask = doorbell < 0 && watching_space;\n        status = attempt(h, argument);\n",
            ),
            (LOOK_AGAIN, LOOK_AGAIN.replace("        status = attempt(h, argument);\n", "")),
        ),
        "one_to_one",
        "1,0,0,0",
    ),
    Plant(
        "baton-dropped",
        "I10",
        "who leaves does not look whether there is more for the next",
        WAIT,
        (("            if (sources[i].baton && sources[i].ready", "            if (false && sources[i].ready"),),
        "baton",
    ),
    Plant(
        "no-ring-all",
        "I10",
        "recovery rings nobody",
        RECOVER,
        (("    shmr_ring_all(h); /* I10: whatever", "    /* I10: whatever"),),
        "in_time",
    ),
    Plant(
        "pending-flag",
        "I10",
        "a doorbell that is marked as posted is not posted again",
        WAIT,
        (
            (
                "    SHMR_STEP(&shmr_doorbell_at(h, doorbell)->owner);\n",
                "    if (shmr_exchange_seq_cst((shmr_word *)(void *)shmr_doorbell_at(h, doorbell)->pad, 1)) return;\n",
            ),
            (
                "    return sem_clockwait(&shmr_doorbell_at(h, (uint32_t)doorbell)->bell,",
                "    shmr_store_relaxed((shmr_word *)(void *)shmr_doorbell_at(h, (uint32_t)doorbell)->pad, 0);\n"
                "    return sem_clockwait(&shmr_doorbell_at(h, (uint32_t)doorbell)->bell,",
            ),
        ),
        "in_time",
        "99,1,0,0",
        20000,
    ),
    Plant(
        "left-registered",
        "I10",
        "who leaves does not unregister",
        WAIT,
        (
            (
                "            shmr_and_acq_rel(&sources[i].waiters[doorbell / 64], ~(UINT64_C(1) << (doorbell % 64))); /* A11 R11 */",
                "            continue;",
            ),
        ),
        "one_to_one",
    ),
    Plant(
        "clears-without-posting",
        "I10",
        "of all the waiters whose bits are cleared only one is posted",
        WAIT,
        (("        for (; bits; bits &= bits - 1)\n            post(h,", "        for (; bits; bits = 0)\n            post(h,"),),
        "two_short",
    ),
    Plant(
        "owners-not-sequential",
        "S6",
        "ringing all may overlook a doorbell that has just been borrowed",
        WAIT,
        (
            ("        if (shmr_load_seq_cst(&shmr_doorbell_at(h, i)->owner))", "        if (shmr_load_relaxed(&shmr_doorbell_at(h, i)->owner))"),
        ),
        "closing",
        "99,0,3,0",
        20000,
    ),
    # --- memory
    Plant(
        "release-silent",
        "S2",
        "a release of another's block does not wake who waits for space",
        BLOCK,
        (
            (
                "    shmr_notify_all(h, p->space_waiters);\n"
                "    /* If somebody is short of whole extents, the owner, asleep on something else, may now have one to give. */\n"
                "    if (shmr_any_waiter(shmr_header_of(h)->extent_waiters)) shmr_ring_all(h);\n",
                "",
            ),
        ),
        "arena_full",
    ),
    Plant(
        "extents-returned-silently",
        "S3",
        "whole free extents are given back without a word",
        ARENA,
        (("    if (any) shmr_notify_all(h, shmr_header_of(h)->extent_waiters);", "    (void)any;"),),
        "two_short",
    ),
    Plant(
        "shortage-not-told",
        "S3",
        "who is short of extents does not ask those who sleep",
        WAIT,
        (("        if (ask) shmr_ring_all(h);", "        if (false) shmr_ring_all(h);"),),
        "shortage",
    ),
    Plant(
        "shortage-not-relieved",
        "S3",
        "who goes to sleep keeps its free extents though somebody is short of them",
        WAIT,
        (("        if (!watching_space) relieve(h);\n", ""), ("static void relieve(shmr *h) {", "__attribute__((unused)) static void relieve(shmr *h) {")),
        "shortage",
    ),
    Plant(
        "last-block-silent",
        "S3",
        "who releases the last block in another's extent does not ring, though somebody is short of extents",
        BLOCK,
        (("    if (shmr_any_waiter(shmr_header_of(h)->extent_waiters)) shmr_ring_all(h);\n", ""),),
        "huge",
    ),
    Plant(
        "records-returned-silently",
        "S3",
        "a group of records is given back without a word",
        BLOCK,
        (
            (
                "    h->free_record_count = left;\n    shmr_notify_all(h, shmr_header_of(h)->extent_waiters);",
                "    h->free_record_count = left;",
            ),
        ),
        "few_records",
    ),
    # --- by reference
    Plant(
        "version-not-counted",
        "I3",
        "a holder sets its bit and does not count the version",
        BLOCK,
        (("    shmr_add_seq_cst(&r->version, 1);     /* S4 I3 */\n", ""),),
        "wide",
        "99,0,0,0",
        200000,
    ),
    Plant(
        "frame-holds-nothing",
        "I4",
        "a frame in flight does not hold what it names",
        BLOCK,
        (
            ("            h->holds[c->refs[i].block]++; /* I4 */\n", ""),
            ("        held->count = c->count;\n", "        held->count = 0;\n"),
        ),
        "by_reference",
    ),
    Plant(
        "last-drop-silent",
        "I4",
        "who drops the last hold does not look whether the block is free now",
        BLOCK,
        (
            (
                "    if (mine)\n        shmr_reclaim(h, block);\n    else if (free_if_unheld(r))\n        shmr_freed_by_me(h, block);\n}",
                "    if (mine) shmr_reclaim(h, block);\n}",
            ),
        ),
        "held_full",
    ),
    Plant(
        "heir-holds-nothing",
        "I4",
        "who takes over an arena does not hold what frames in flight name",
        RECOVER,
        (("            if (shmr_state_flags(s) & SHMR_HAS_REFERENCES && !h->frame_refs[block]", "            if (false && !h->frame_refs[block]"),),
        "by_reference",
    ),
    Plant(
        "bits-cleared-first",
        "I4",
        "recovery clears the holder bits of the dead before it holds what the frames of the dead name",
        RECOVER,
        (
            (
                "    adopt(h, &rec->slots);\n"
                "    for (uint32_t i = 0; i < h->g.config.participants; i++)\n"
                "        if (shmr_slots_have(&rec->slots, i)) clear_holder_bits(h, i);\n",
                "    for (uint32_t i = 0; i < h->g.config.participants; i++)\n"
                "        if (shmr_slots_have(&rec->slots, i)) clear_holder_bits(h, i);\n"
                "    adopt(h, &rec->slots);\n",
            ),
        ),
        "by_reference",
        "99,1,0,0",
        200000,
    ),
    Plant(
        "bits-of-the-dead-stay",
        "I3",
        "recovery does not clear the holder bits of the dead",
        RECOVER,
        (("            shmr_and_seq_cst(&r->holders[dead / 64], ~bit); /* S4 */\n", ""),),
        "by_reference",
    ),
    # --- recovery
    Plant(
        "insert-undone",
        "I7",
        "recovery frees a COMMITTED block that is in no slot, instead of finishing its insert",
        RECOVER,
        (
            (
                "        if (shmr_cas_acq_rel(&r->state, &s, shmr_state_pack(generation, h->self, ring, flags, SHMR_COMMITTED))) /* A1 R1 */\n"
                "            insert_or_keep(h, ring, block, generation);",
                "        if (shmr_cas_seq_cst(&r->state, &s, shmr_state_pack(generation, 0, 0, 0, SHMR_FREE)))\n"
                "            shmr_freed_by_me(h, block);",
            ),
        ),
        "forwarded",
    ),
    Plant(
        "lease-freed",
        "I7",
        "recovery frees what the dead one had leased, instead of putting it back",
        RECOVER,
        (
            (
                "    case SHMR_CLAIMED:\n        if (shmr_cas_seq_cst(",
                "    case SHMR_LEASED:\n    case SHMR_CLAIMED:\n        if (shmr_cas_seq_cst(",
            ),
            ("    case SHMR_LEASED:\n        if (rec->taken &&", "    case 15:\n        if (rec->taken &&"),
        ),
        "one_to_one",
    ),
    Plant(
        "attempt-not-counted",
        "R1",
        "what comes back after a death does not say so",
        RECOVER,
        (("            add_attempt(r);\n", "            (void)add_attempt;\n"),),
        "one_to_one",
    ),
    Plant(
        "retry-forgotten",
        "I7",
        "recovery forgets what it found no room for",
        RECOVER,
        (("            h->again[left++] = block;\n", "            continue;\n"),),
        "overflow",
    ),
    Plant(
        "recoverer-alone",
        "R13",
        "who recovers a dead recoverer does not take over what that one had begun",
        RECOVER,
        (("            !shmr_slots_have(&rec->slots, shmr_life_by(life)))", "            true)"),),
        "recoverers",
    ),
    Plant(
        "vacant-too-early",
        "R13",
        "a place in the table is free before what its owner left is disposed of",
        RECOVER,
        (
            (
                "    gather(h, rec);\n    for (uint32_t g",
                "    gather(h, rec);\n"
                "    for (uint32_t i = 0; i < h->g.config.participants; i++)\n"
                "        if (shmr_slots_have(&rec->slots, i) && i != h->self) shmr_store_release(&shmr_participant_at(h, i)->life, 0);\n"
                "    for (uint32_t g",
            ),
        ),
        "successor",
        "99,1,0,0",
        50000,
    ),
    Plant(
        "waits-of-the-dead-stay",
        "I10",
        "recovery does not clear the bits of a waiter that died",
        RECOVER,
        (("            shmr_and_acq_rel(&shmr_ring_at(h, r)->item_waiters[d / 64], mask); /* A11 R11 */\n", ""),),
        "two_by_two",
    ),
)
