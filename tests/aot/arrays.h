/* Arrays and bytes for the programs that run libraries (run_model.c, train_model.c).

   Built as it is, every array ends at a page that must not be touched, or begins behind one. With PLAIN, arrays come from malloc, for memcheck and
   AddressSanitizer. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 65536 };
typedef int64_t i64;
typedef struct { i64 threads; void *(*allocate)(size_t, size_t, void *); void (*release)(void *, void *); void *user; const void *weights; } options;
typedef struct { unsigned char *base, *at; size_t bytes, pages; } array;

static void fail(const char *what, const char *more) { fprintf(stderr, "%s: %s\n", what, more); exit(3); }

static void take(void *into, size_t bytes) { if (bytes && fread(into, 1, bytes, stdin) != bytes) fail("input ends", ""); }

static i64 number(void) { i64 n; take(&n, sizeof n); return n; }

static array make(size_t bytes, int at_end) {
    array a = {0};
    a.bytes = bytes;
#ifdef PLAIN
    (void)at_end;
    if (posix_memalign((void **)&a.base, 64, bytes)) fail("memory", "");
    a.at = a.base;
#else
    a.pages = (bytes + PAGE - 1) / PAGE * PAGE;
    a.base = mmap(NULL, a.pages + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (a.base == MAP_FAILED || (a.pages && mprotect(a.base + PAGE, a.pages, PROT_READ | PROT_WRITE))) fail("memory", "");
    a.at = a.base + PAGE + (at_end ? a.pages - bytes : 0);
    memset(a.base + PAGE, 0xA5, a.pages);
#endif
    return a;
}

static void keep(array a) {
#ifndef PLAIN
    if (a.pages && mprotect(a.base + PAGE, a.pages, PROT_READ)) fail("memory", "");
#endif
    (void)a;
}

static void end(array a) {
#ifdef PLAIN
    free(a.base);
#else
    for (size_t k = 0; k < a.pages; k++) {
        unsigned char *p = a.base + PAGE + k;
        if ((p < a.at || p >= a.at + a.bytes) && *p != 0xA5) fail("written beside an array", "");
    }
    munmap(a.base, a.pages + 2 * PAGE);
#endif
}

static void *symbol(void *library, const char *prefix, const char *name) {
    char full[256];
    snprintf(full, sizeof full, "%s_%s", prefix, name);
    void *found = dlsym(library, full);
    if (!found) fail("no function", full);
    return found;
}
