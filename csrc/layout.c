/* SPDX-License-Identifier: BSD-3-Clause */
/* Prints what lies where in a region: the table in README.md. Not part of the core. */
#include <inttypes.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "shmr_internal.h"

static void part(const char *name, uint64_t at, uint64_t bytes, uint64_t count, const char *reserved) {
    printf("%-16s %12" PRIu64 " %8" PRIu64 " x %-8" PRIu64 " %s\n", name, at, bytes, count, reserved);
}

static int print_region(void) {
    /* An engine with two workers and a budget of 1 GiB. */
    const shmr_config config = {.participants = 64, .doorbells = 64, .rings = 2, .blocks = 1u << 20,
                                .arena_bytes = UINT64_C(1) << 30, .capacity = {4096, 4096}};
    const uint64_t total = shmr_region_bytes(&config);
    int fd = memfd_create("layout", MFD_CLOEXEC);
    shmr *h;
    if (fd < 0 || ftruncate(fd, (off_t)total) != 0 || shmr_create(fd, &config, &h) != SHMR_OK) {
        fprintf(stderr, "no region: %s\n", shmr_last_detail());
        return 1;
    }
    const struct shmr_geometry *g = &h->g;
    printf("region                     at    bytes x count    reserved\n");
    part("header", 0, sizeof(struct shmr_header), 1, "at creation");
    part("participants", g->participants_at, sizeof(struct shmr_participant), config.participants, "at creation");
    part("doorbells", g->doorbells_at, sizeof(struct shmr_doorbell), config.doorbells, "at creation");
    part("rings", g->rings_at, sizeof(struct shmr_ring), config.rings, "at creation");
    for (uint32_t i = 0; i < config.rings; i++) {
        char name[] = "slots of ring 0";
        name[sizeof name - 2] = (char)('0' + i);
        part(name, g->slots_at[i], sizeof(shmr_word), g->slots[i], "at creation");
    }
    part("extents", g->extents_at, sizeof(shmr_word), g->extents, "at creation");
    part("groups", g->groups_at, sizeof(struct shmr_group), g->groups, "at creation");
    part("records", g->records_at, sizeof(struct shmr_record), config.blocks, "a group at a time");
    part("arena", g->arena_at, SHMR_EXTENT, g->extents, "an extent at a time");
    printf("%-16s %12" PRIu64 "\n", "end", g->total);
    shmr_close(h, 0);
    shmr_free(h);
    close(fd);
    return 0;
}

#define STRUCT(name) printf("\nstruct %-16s %8zu bytes\n", #name, sizeof(struct name))
#define FIELD(name, field) \
    printf("  %-20s %5zu %5zu\n", #field, offsetof(struct name, field), sizeof(((struct name *)NULL)->field))

int main(void) {
    if (print_region() != 0) return 1;
    STRUCT(shmr_header);
    FIELD(shmr_header, magic);
    FIELD(shmr_header, abi);
    FIELD(shmr_header, hash);
    FIELD(shmr_header, config);
    FIELD(shmr_header, poisoned);
    FIELD(shmr_header, deaths);
    FIELD(shmr_header, joins);
    FIELD(shmr_header, extent_waiters);
    FIELD(shmr_header, idle_waiters);
    STRUCT(shmr_participant);
    FIELD(shmr_participant, life);
    FIELD(shmr_participant, start_time);
    FIELD(shmr_participant, pid_namespace);
    FIELD(shmr_participant, freed_hint);
    FIELD(shmr_participant, space_waiters);
    FIELD(shmr_participant, task_tag);
    FIELD(shmr_participant, task_index);
    FIELD(shmr_participant, task_since_ns);
    FIELD(shmr_participant, starving);
    FIELD(shmr_participant, denied);
    FIELD(shmr_participant, aborted);
    FIELD(shmr_participant, released);
    FIELD(shmr_participant, late_releases);
    FIELD(shmr_participant, rescued_wakeups);
    FIELD(shmr_participant, committed);
    FIELD(shmr_participant, leased);
    FIELD(shmr_participant, bytes_committed);
    FIELD(shmr_participant, undo_state);
    FIELD(shmr_participant, undo_block);
    FIELD(shmr_participant, undo);
    STRUCT(shmr_doorbell);
    FIELD(shmr_doorbell, owner);
    FIELD(shmr_doorbell, bell);
    STRUCT(shmr_ring);
    FIELD(shmr_ring, commit_cursor);
    FIELD(shmr_ring, lease_cursor);
    FIELD(shmr_ring, item_waiters);
    FIELD(shmr_ring, slot_waiters);
    FIELD(shmr_ring, closed);
    FIELD(shmr_ring, lessee);
    STRUCT(shmr_group);
    FIELD(shmr_group, owner);
    FIELD(shmr_group, freed);
    STRUCT(shmr_record);
    FIELD(shmr_record, state);
    FIELD(shmr_record, offset);
    FIELD(shmr_record, room);
    FIELD(shmr_record, length);
    FIELD(shmr_record, seq);
    FIELD(shmr_record, tag);
    FIELD(shmr_record, detail);
    FIELD(shmr_record, check);
    FIELD(shmr_record, version);
    FIELD(shmr_record, holders);
    FIELD(shmr_record, references);
    FIELD(shmr_record, spare);
    FIELD(shmr_record, spec);
    return 0;
}
