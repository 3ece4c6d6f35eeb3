/* Two models in one process, used as badly as the header allows; used by test_c.py. Each part prints its name when it begins. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "one.h"
#include "two.h"

enum { ROWS = 300, WIDTH = 64 };
#define CHECK(what) do { if (!(what)) { printf("line %d: %s\n", __LINE__, #what); exit(1); } } while (0)
static float input[ROWS * WIDTH], want_one[ROWS * WIDTH], want_two[ROWS];

static void run_one_into(one *m, int64_t rows, float *out) {
    CHECK(one_forward(m, rows, input, out) == ONE_OK);
    CHECK(memcmp(out, want_one, rows * WIDTH * sizeof *out) == 0);
}

static void run_one(one *m, int64_t rows) {
    float *out = malloc(rows * WIDTH * sizeof *out);
    run_one_into(m, rows, out);
    free(out);
}

static void run_two(two *m, int64_t rows) {
    float *out = malloc(rows * sizeof *out);
    CHECK(two_forward(m, rows, input, out) == TWO_OK);
    CHECK(memcmp(out, want_two, rows * sizeof *out) == 0);
    free(out);
}

static void *worker(void *number) {
    intptr_t k = (intptr_t)number;
    one_options o = {.threads = 1 + k % 2};
    two_options p = {.threads = 2 - k % 2};
    for (int round = 0; round < 10; round++) {
        one *a, *c;
        two *b;
        CHECK(one_create(&o, &a) == ONE_OK && two_create(&p, &b) == TWO_OK && one_create(&o, &c) == ONE_OK);
        for (int n = 0; n < 3; n++) {
            run_one(a, ROWS - n);
            run_two(b, ROWS - 7 * n);
            run_one(c, 1 + n);
        }
        one_destroy(a); /* while other threads run theirs */
        run_one(c, ROWS);
        one_destroy(c);
        two_destroy(b);
    }
    return NULL;
}

static int threads_of_process(void) {
    char line[256];
    int count = -1;
    FILE *file = fopen("/proc/self/status", "r");
    while (file && fgets(line, sizeof line, file)) sscanf(line, "Threads: %d", &count);
    fclose(file);
    return count;
}

/* A thread that was joined is counted until the kernel has taken it away, which may come a little later. */
static int one_thread_left(void) {
    for (int k = 0; k < 20000 && threads_of_process() != 1; k++) usleep(1000);
    return threads_of_process() == 1;
}

static long resident(void) {
    long all, pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (fscanf(file, "%ld %ld", &all, &pages) != 2) pages = 0;
    fclose(file);
    return pages * sysconf(_SC_PAGESIZE);
}

typedef struct { int left, live, calls; } counts;

static void *counted(size_t bytes, size_t alignment, void *user) {
    counts *c = user;
    c->calls++;
    if (c->left-- == 0) return NULL;
    c->live++;
    CHECK(alignment == 64 && bytes % 64 == 0);
    void *memory = aligned_alloc(alignment, bytes);
    memset(memory, 0xEE, bytes); /* nobody may count on zeros */
    return memory;
}

static void uncounted(void *memory, void *user) {
    ((counts *)user)->live--;
    free(memory);
}

static void allocators(void) {
    int failures = 0;
    for (int fail_at = -1; fail_at < 6; fail_at++) {
        counts c = {fail_at, 0, 0};
        one_options o = {.threads = 2, .allocate = counted, .release = uncounted, .user = &c};
        one *m = (one *)&c;
        int code = one_create(&o, &m);
        if (code == ONE_NO_MEMORY) {
            CHECK(m == NULL && c.live == 0);
            failures++;
            continue;
        }
        CHECK(code == ONE_OK);
        float *out = malloc(ROWS * WIDTH * sizeof *out);
        for (int64_t rows = 10; rows <= ROWS; rows += ROWS - 10) { /* the second needs more */
            code = one_forward(m, rows, input, out);
            if (code != ONE_OK) {
                CHECK(code == ONE_NO_MEMORY && strstr(one_message(m), "memory"));
                failures++;
                run_one(m, rows); /* it goes on as soon as there is some */
            }
        }
        free(out);
        one_destroy(m);
        CHECK(c.live == 0);
        if (fail_at < 0) CHECK(c.calls > 1);
    }
    CHECK(failures >= 3);
}

static volatile int looping;

/* It allocates nothing: a child of a fork may use `malloc`, but AddressSanitizer's (GCC 12's) is left locked if another thread was in it. */
static void *loop(void *model) {
    static float out[ROWS * WIDTH];
    while (looping) run_one_into(model, ROWS, out);
    return NULL;
}

/* Forks while another thread runs `busy`: at any place of a call, often with the pool of threads in its hands. The child goes on with the models that it
   has got, and with one of its own; it has workers again, and ends all. */
static void forked(void) {
    one_options o = {.threads = 2};
    one *busy, *idle;
    CHECK(one_create(&o, &busy) == ONE_OK && one_create(&o, &idle) == ONE_OK);
    run_one(idle, ROWS);
    fflush(stdout);
    pthread_t thread;
    looping = 1;
    CHECK(pthread_create(&thread, NULL, loop, busy) == 0);
    for (int k = 0; k < 40; k++) {
        usleep(100 + 37 * k);
        pid_t child = fork();
        if (child == 0) {
            alarm(200);
            CHECK(threads_of_process() == 1);
            one *other;
            run_one(k % 2 ? busy : idle, ROWS);
            CHECK(threads_of_process() == 2);
            CHECK(one_create(&o, &other) == ONE_OK);
            run_one(other, ROWS);
            run_one(k % 2 ? idle : busy, ROWS - k);
            if (k % 3 == 0) run_one(busy, 5);
            one_destroy(other);
            one_destroy(busy);
            one_destroy(idle);
            CHECK(one_thread_left());
            _exit(0);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child);
        if (status) printf("child %d ended with status %d\n", k, status);
        CHECK(status == 0);
    }
    looping = 0;
    pthread_join(thread, NULL);
    run_one(idle, ROWS);
    one_destroy(idle);
    one_destroy(busy);
    CHECK(one_thread_left());
}

static void codes(void) {
    one *m;
    one_options o = {.threads = -1};
    CHECK(one_create(NULL, NULL) == ONE_NULL_ARGUMENT);
    CHECK(one_create(&o, &m) == ONE_BAD_OPTION && m == NULL);
    o = (one_options){.allocate = counted};
    CHECK(one_create(&o, &m) == ONE_BAD_OPTION && m == NULL);
    o = (one_options){.weights = (const char *)input + 1};
    CHECK(one_create(&o, &m) == ONE_BAD_OPTION && m == NULL);
    CHECK(one_forward(NULL, 1, input, want_one) == ONE_NULL_ARGUMENT && one_message(NULL) != NULL);
    CHECK(one_set_scratch(NULL, NULL, 0) == ONE_NULL_ARGUMENT && one_forward_scratch_bytes(NULL, 1) == -ONE_NULL_ARGUMENT);
    CHECK(one_state(NULL, "x", NULL) == NULL);
    CHECK(one_create(NULL, &m) == ONE_OK && one_state(m, "nothing", NULL) == NULL && one_state(m, NULL, NULL) == NULL);
    float out[WIDTH];
    int64_t bad[] = {-1, INT64_MIN, INT64_MAX, (int64_t)1 << 60, (int64_t)1 << 46};
    for (int k = 0; k < 5; k++) {
        CHECK(one_forward(m, bad[k], input, out) == ONE_BAD_SIZE && *one_message(m));
        CHECK(one_forward_scratch_bytes(m, bad[k]) == -ONE_BAD_SIZE);
    }
    CHECK(one_forward(m, 1, NULL, out) == ONE_NULL_ARGUMENT && one_forward(m, 1, input, NULL) == ONE_NULL_ARGUMENT);
    CHECK(one_forward(m, 0, NULL, NULL) == ONE_OK);
    CHECK(one_set_scratch(m, input, -1) == ONE_BAD_OPTION);
    run_one(m, 5);
    one_destroy(m);
}

int main(void) {
    one *m;
    two *n;
    for (int k = 0; k < ROWS * WIDTH; k++) input[k] = (float)(k * 37 % 101) / 50 - 1;
    one_options single = {.threads = 1};
    CHECK(one_create(&single, &m) == ONE_OK && two_create(NULL, &n) == TWO_OK);
    CHECK(one_forward(m, ROWS, input, want_one) == ONE_OK && two_forward(n, ROWS, input, want_two) == TWO_OK);
    one_destroy(m);
    two_destroy(n);
    puts("codes");
    codes();
    puts("allocators");
    allocators();
    puts("fork");
    forked();
    puts("threads");
    pthread_t threads[8];
    for (intptr_t k = 0; k < 8; k++) CHECK(pthread_create(&threads[k], NULL, worker, (void *)k) == 0);
    for (int k = 0; k < 8; k++) pthread_join(threads[k], NULL);
    CHECK(one_thread_left()); /* workers end with the last model */
    puts("again and again");
    long before = 0;
    for (int k = 0; k < 1000; k++) {
        one_options o = {.threads = 2};
        CHECK(one_create(&o, &m) == ONE_OK);
        if (k % 20 == 0) run_one(m, ROWS);
        one_destroy(m);
        if (k == 100) before = resident();
    }
    CHECK(one_thread_left() && resident() < before + (4 << 20));
    return 0;
}
