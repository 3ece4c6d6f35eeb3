/* Trains by a library; used by test_training_c.py.
   train_model LIBRARY PREFIX THREADS FROM TO: FROM is a seed for init, or the path of a checkpoint; TO is where one is saved at the end.
   Standard input: for each step the code that it is to have, whether one byte less of scratch memory is too little, the free size, bytes of x and of y
   (int64), then x and y. Standard output: the loss of each
   step that is to go well, then what `forward` makes of the last x (ten f32 a row).
   Inputs, losses, and all memory of the model (its states and temporaries too: they come from `guarded`) are guarded as arrays.h has it. */
#include "arrays.h"

static int live;

static void *guarded(size_t bytes, size_t alignment, void *user) {
    if (alignment != 64 || bytes % 64) fail("an odd request for memory", "");
    array *made = user;
    while (made->base) made++;
    *made = make(bytes, 1);
    live++;
    return made->at;
}

static void unguarded(void *memory, void *user) {
    array *made = user;
    while (made->at != memory) made++;
    end(*made);
    made->base = made->at = NULL;
    live--;
}

int main(int count, char **given) {
    void *library = count < 6 ? NULL : dlopen(given[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) fail("no library", count < 6 ? "" : dlerror());
    int (*create)(const options *, void **) = (int (*)(const options *, void **))symbol(library, given[2], "create");
    void (*destroy)(void *) = (void (*)(void *))symbol(library, given[2], "destroy");
    const char *(*message)(void *) = (const char *(*)(void *))symbol(library, given[2], "message");
    int (*init)(void *, i64) = (int (*)(void *, i64))symbol(library, given[2], "init");
    int (*load)(void *, const char *) = (int (*)(void *, const char *))symbol(library, given[2], "load");
    int (*save)(void *, const char *) = (int (*)(void *, const char *))symbol(library, given[2], "save");
    int (*step)(void *, i64, const void *, const void *, void *) = (int (*)(void *, i64, const void *, const void *, void *))symbol(library, given[2], "train_step");
    i64 (*step_bytes)(void *, i64) = (i64 (*)(void *, i64))symbol(library, given[2], "train_step_scratch_bytes");
    int (*set_scratch)(void *, void *, i64) = (int (*)(void *, void *, i64))symbol(library, given[2], "set_scratch");
    int (*run)(void *, i64, const void *, void *) = (int (*)(void *, i64, const void *, void *))symbol(library, given[2], "forward");
    void *(*state)(void *, const char *, i64 *) = (void *(*)(void *, const char *, i64 *))symbol(library, given[2], "state");
    array memory[64] = {0};
    options o = {atoi(given[3]), guarded, unguarded, memory, NULL};
    void *model;
    if (create(&o, &model)) fail("create", "");
    if (load(model, "/nowhere/at/all") != 8 || !*message(model) || save(model, "/nowhere/at/all") != 8) fail("a path that is none", "");
    char *rest;
    i64 seed = strtoll(given[4], &rest, 10), bytes = 0;
    if (*rest ? load(model, given[4]) : init(model, seed)) fail("from", message(model));
    if (!state(model, "generator", &bytes) || bytes != 16 || state(model, "nothing", NULL)) fail("state", "");
    int steps = 0;
    for (int c; (c = getchar()) != EOF; steps++) {
        ungetc(c, stdin);
        i64 code = number(), tight = number(), n = number(), x_bytes = number(), y_bytes = number();
        array x = make(x_bytes, steps % 2 == 0), y = make(y_bytes, steps % 2 == 0), loss = make(4, steps % 2), out = make(n * 40, steps % 2);
        take(x.at, x_bytes);
        take(y.at, y_bytes);
        keep(x);
        keep(y);
        array scratch = {0};
        if (steps < 3) { /* also in memory of the caller's that is as large as it must be */
            i64 need = step_bytes(model, n);
            if (need < 0) fail("scratch_bytes", message(model));
            scratch = make(need, 1);
            if (tight && (set_scratch(model, scratch.at, need - 1) || step(model, n, x.at, y.at, loss.at) != 5)) fail("small scratch", message(model));
            if (set_scratch(model, scratch.at, need)) fail("set_scratch", message(model));
        }
        i64 got = step(model, n, x.at, y.at, loss.at);
        if (got != code) fail("step", message(model));
        if (code == 0) fwrite(loss.at, 4, 1, stdout);
        if (scratch.base) {
            if (set_scratch(model, NULL, 0)) fail("set_scratch", message(model));
            end(scratch);
        }
        if (run(model, n, x.at, out.at)) fail("forward", message(model));
        c = getchar();
        if (c == EOF) fwrite(out.at, 40, n, stdout);
        else ungetc(c, stdin);
        end(x);
        end(y);
        end(loss);
        end(out);
    }
    if (save(model, given[5]) || load(model, given[5])) fail("to", message(model));
    destroy(model);
    if (live) fail("memory is left", "");
    dlclose(library);
    return 0;
}
