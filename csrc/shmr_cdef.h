/* SPDX-License-Identifier: BSD-3-Clause */
/* What cffi parses: the declarations of shmr.h. A test compares the two. */
#define SHMR_OK ...
#define SHMR_WOULD_BLOCK ...
#define SHMR_TIMEOUT ...
#define SHMR_INTERRUPTED ...
#define SHMR_CLOSED ...
#define SHMR_NO_MEMORY ...
#define SHMR_STALE ...
#define SHMR_FORKED ...
#define SHMR_CORRUPT ...
#define SHMR_MISMATCH ...
#define SHMR_SYSTEM ...
#define SHMR_CROWDED ...
#define SHMR_PEER_LOST ...
#define SHMR_ITEM_WAITS ...
#define SHMR_NOT_SHARED ...
#define SHMR_BAD_ARGUMENT ...
#define SHMR_DENIED ...
#define SHMR_TOO_LARGE ...
typedef struct shmr shmr;
typedef struct shmr_mapping shmr_mapping;
typedef struct {
    uint32_t participants;
    uint32_t doorbells;
    uint32_t rings;
    uint32_t blocks;
    uint64_t arena_bytes;
    uint64_t start;
    uint64_t flags;
    uint64_t capacity[8];
} shmr_config;
#define SHMR_BRIEFLY ...
#define SHMR_CREATOR_RECOVERS ...
#define SHMR_WAIT_ALONE ...
typedef struct {
    uint64_t state;
    uint32_t block;
    uint32_t kind;
    uint64_t tag;
    uint64_t offset;
    uint64_t room;
    uint64_t length;
    uint64_t seq;
    uint32_t producer;
    uint32_t attempts;
    uint32_t references;
    uint32_t spec_bytes;
    unsigned char spec[128];
} shmr_block;
typedef struct {
    uint32_t block;
    uint32_t generation;
    uint64_t offset;
    uint64_t length;
} shmr_ref;
typedef struct {
    uint64_t budget;
    uint64_t reserved;
    uint64_t owned;
    uint64_t used;
    uint64_t held;
    uint64_t pins;
    uint64_t committed, leased, aborted, released, bytes_committed;
    uint64_t late_releases, rescued_wakeups;
    uint64_t participants, deaths, joins;
} shmr_counters;
#define SHMR_SCATTER_SOURCES ...
#define SHMR_SCATTER_UNSENT ...
#define SHMR_SCATTER_OUT ...
#define SHMR_SCATTER_BACK ...
typedef struct {
    const char *address;
    uint64_t pitch;
    uint64_t bytes;
    uint64_t before;
    uint64_t after;
} shmr_scatter_source;
typedef struct {
    uint32_t sources;
    uint32_t task_ring, result_ring;
    uint32_t task_kind, result_kind;
    int payload_check;
    shmr_scatter_source source[16];
    char *target;
    uint64_t target_pitch;
    uint64_t target_bytes;
    unsigned char *states;
    uint64_t count;
    uint64_t first_tag;
    uint64_t stop;
    int64_t limit;
    uint32_t spec_bytes;
    unsigned char spec[128];
    uint64_t next;
    int64_t out;
    int64_t arrived;
    uint64_t bytes_sent, bytes_copied;
} shmr_scatter;
typedef struct {
    int fd;
    uint32_t pid;
    uint64_t device, inode;
} shmr_file;
uint64_t shmr_region_bytes(const shmr_config *config);
int shmr_create(int fd, const shmr_config *config, shmr **out);
int shmr_attach(int fd, shmr **out);
int shmr_close(shmr *h, int force);
void shmr_free(shmr *h);
void shmr_forget(shmr *h);
uint32_t shmr_self(const shmr *h);
void *shmr_base(const shmr *h);
uint64_t shmr_mapped_bytes(const shmr *h);
shmr_mapping *shmr_mapping_retain(shmr *h);
void shmr_mapping_release(shmr_mapping *mapping);
void shmr_read_counters(shmr *h, shmr_counters *out);
void shmr_read_config(const shmr *h, shmr_config *out);
void shmr_count_late_release(shmr *h);
int shmr_claim(shmr *h, uint64_t bytes, const shmr_ref *refs, uint32_t count, int items, int64_t deadline,
               shmr_block *out);
void shmr_announce(shmr *h, uint32_t ring);
int shmr_commit(shmr *h, uint32_t ring, int payload_check, int items, int64_t deadline, shmr_block *block);
int shmr_abort(shmr *h, shmr_block *block);
int shmr_send(shmr *h, uint32_t ring, int payload_check, int64_t deadline, const void *bytes, shmr_block *block);
int shmr_lease(shmr *h, uint32_t ring, int payload_check, int64_t deadline, shmr_block *out);
int shmr_check_payload(shmr *h, const shmr_block *block);
int shmr_release(shmr *h, shmr_block *block);
int shmr_references(shmr *h, const shmr_block *block, shmr_ref *out, uint32_t count);
int shmr_share(shmr *h, const void *address, uint64_t bytes, shmr_ref *out);
int shmr_allocated_here(shmr *h, const void *address);
int shmr_hold(shmr *h, uint32_t block, uint32_t generation, shmr_ref *out);
int shmr_drop(shmr *h, uint32_t block, uint32_t generation);
int shmr_publish(shmr *h, shmr_block *block, shmr_ref *out);
uint64_t shmr_approx_fill(shmr *h, uint32_t ring);
int shmr_has_room(shmr *h, uint32_t ring);
int shmr_close_ring(shmr *h, uint32_t ring);
int shmr_wait_item(shmr *h, uint32_t ring, int64_t deadline);
int shmr_wait_idle(shmr *h, uint32_t ring, int64_t deadline);
void shmr_notify_idle(shmr *h);
void shmr_ring_all(shmr *h);
int shmr_find(shmr *h, uint32_t pid);
int shmr_check_deaths(shmr *h);
int shmr_adopt(shmr *h);
int shmr_recover(shmr *h, uint32_t slot, shmr_block *taken, uint32_t room, uint32_t *count);
uint32_t shmr_live_participants(shmr *h);
void shmr_leases(shmr *h, uint32_t *pids, uint64_t *counts);
void shmr_set_progress(shmr *h, uint64_t tag, uint64_t index);
int shmr_progress(shmr *h, uint32_t slot, uint64_t *tag, uint64_t *index, uint64_t *since_ns, uint64_t *starving);
void shmr_deny(shmr *h, uint32_t slot);
void shmr_trim(shmr *h);
void shmr_leave_extents(shmr *h, uint32_t count);
int shmr_watch_parent(int pidfd);
int shmr_signal_main_thread(uint32_t pid, int number);
void shmr_watch_shortage(shmr *h);
void shmr_print_lines(void);
void shmr_flush_prints(void);
int shmr_scatter_send(shmr *h, shmr_scatter *scatter, int64_t deadline);
int shmr_scatter_accept(shmr *h, shmr_scatter *scatter, shmr_block *message);
int shmr_scatter_settle(shmr_scatter *scatter, uint64_t tag);
int shmr_scatter_run(shmr *h, shmr_scatter *scatter, uint32_t turns, int64_t deadline, shmr_block *message);
void *shmr_numpy_handler(shmr *h, uint64_t threshold, uint64_t limit);
typedef struct shmr_loans shmr_loans;
typedef struct {
    const void *bytes;
    uint64_t length;
} shmr_piece;
typedef struct {
    uint64_t begin, length, number;
} shmr_loan;
int shmr_loans_file(uint64_t bytes);
shmr_loans *shmr_loans_new(void);
void shmr_loans_free(shmr_loans *l);
int shmr_loans_use(shmr_loans *l, int fd);
int shmr_loans_make(shmr_loans *l, uint64_t bytes);
const shmr_file *shmr_loans_offer(const shmr_loans *l);
int shmr_loans_accept(shmr_loans *l, int pid, const shmr_file *offer);
int shmr_loans_lend(shmr_loans *l, const shmr_piece *pieces, uint32_t count, shmr_loan *out);
int shmr_loans_has(const shmr_loans *l, const shmr_loan *loan);
int shmr_loans_copy(shmr_loans *l, const shmr_loan *loan, void *target);
void shmr_loans_give_back(shmr_loans *l, const shmr_loan *loan);
void shmr_loans_rest(shmr_loans *l);
#define SHMR_PRIORITIES ...
#define SHMR_SMALL_FRAME ...
typedef struct shmr_stream shmr_stream;
typedef struct {
    const char *bytes;
    uint64_t length;
    uint64_t number;
    uint32_t priority;
    uint32_t kind;
    uint32_t parts;
    uint32_t prefix;
    uint32_t in_band;
    uint32_t producer;
    uint64_t sequence;
} shmr_message;
shmr_stream *shmr_stream_new(int fd, uint32_t fragment_bytes);
void shmr_stream_free(shmr_stream *s);
void shmr_stream_lend(shmr_stream *s, shmr_loans *loans);
int shmr_stream_send(shmr_stream *s, const shmr_piece *pieces, uint32_t count, uint32_t priority, int64_t deadline);
int shmr_stream_send_frame(shmr_stream *s, const void *bytes, uint64_t length, uint32_t priority, int whole,
                           int64_t deadline);
void shmr_stream_give_up(shmr_stream *s);
uint64_t shmr_stream_sent(const shmr_stream *s, uint32_t priority);
void shmr_stream_goodbye(shmr_stream *s);
int shmr_stream_receive(shmr_stream *s, uint64_t taken, int64_t deadline, shmr_message *out);
void shmr_stream_give_memory(shmr_stream *s, void *memory);
int shmr_file_keep(shmr_file *file, int fd);
int shmr_file_is_ours(const shmr_file *file, uint64_t *bytes);
void shmr_file_close(shmr_file *file);
uint32_t shmr_crc32c(uint32_t crc, const void *bytes, uint64_t length);
void shmr_copy(void *target, const void *source, uint64_t length);
void shmr_copy_near(void *target, const void *source, uint64_t length);
int shmr_last_errno(void);
const char *shmr_last_detail(void);
const char *shmr_status_text(int status);
int shmr_abi(void);
