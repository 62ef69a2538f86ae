/* Two rivals without Python: a ring that copies, and round trips, both on bare POSIX semaphores.
 *
 *   rival_ring_send:     wait(free) - memcpy into the slot - post(full)
 *   rival_ring_receive:  wait(full) - the slot is read in place - rival_ring_release: post(free)
 *
 * One producer, one consumer; no checks, and nobody may die.
 */
#include <errno.h>
#include <semaphore.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define ALIGNED _Alignas(64)

struct ring {
    ALIGNED sem_t free;
    ALIGNED sem_t full;
    ALIGNED uint64_t sent;
    ALIGNED uint64_t taken;
};

struct trip {
    ALIGNED sem_t there;
    ALIGNED sem_t back;
    ALIGNED unsigned char message[64];
};

static void wait_for(sem_t *semaphore)
{
    while (sem_wait(semaphore) != 0 && errno == EINTR)
        ;
}

size_t rival_ring_header(void)
{
    return 4096;
}

void rival_ring_init(struct ring *ring, unsigned slots)
{
    sem_init(&ring->free, 1, slots);
    sem_init(&ring->full, 1, 0);
    ring->sent = ring->taken = 0;
}

void rival_ring_send(struct ring *ring, const void *from, size_t nbytes, unsigned slots)
{
    wait_for(&ring->free);
    memcpy((char *)ring + rival_ring_header() + ring->sent++ % slots * nbytes, from, nbytes);
    sem_post(&ring->full);
}

unsigned rival_ring_receive(struct ring *ring, unsigned slots)
{
    wait_for(&ring->full);
    return (unsigned)(ring->taken++ % slots);
}

void rival_ring_release(struct ring *ring)
{
    sem_post(&ring->free);
}

/* --- round trips ----------------------------------------------------------------------------- */

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static void think(uint64_t ns)
{
    for (uint64_t end = now() + ns; ns != 0 && now() < end;)
        ;
}

void rival_trip_init(struct trip *trip)
{
    sem_init(&trip->there, 1, 0);
    sem_init(&trip->back, 1, 0);
}

/* Both sides think before they send, so that the other one is asleep. `times` gets what each round trip took, with the
 * other side's thinking. Returns how many answers were right. */
unsigned rival_ping(struct trip *trip, unsigned count, uint64_t think_ns, uint64_t *times)
{
    unsigned right = 0;
    for (unsigned number = 0; number < count; number++) {
        think(think_ns);
        uint64_t start = now();
        memset(trip->message, (int)(number & 127), sizeof trip->message);
        sem_post(&trip->there);
        wait_for(&trip->back);
        times[number] = now() - start;
        right += trip->message[63] == (number & 127) + 1;
    }
    return right;
}

unsigned rival_pong(struct trip *trip, unsigned count, uint64_t think_ns)
{
    for (unsigned number = 0; number < count; number++) {
        wait_for(&trip->there);
        think(think_ns);
        memset(trip->message, trip->message[63] + 1, sizeof trip->message);
        sem_post(&trip->back);
    }
    return count;
}
