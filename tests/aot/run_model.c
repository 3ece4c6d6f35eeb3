/* Runs `forward` of a library on jobs from standard input and writes the outputs to standard output; used by test_c.py.
   run_model LIBRARY PREFIX [WEIGHTS]. A job: threads, number of sizes, sizes, number of inputs, number of outputs, bytes of each (all int64), inputs.
   Inputs, outputs, weights and the model's scratch memory are guarded as arrays.h has it: each job runs twice, up against a page and behind one. */
#include "arrays.h"

enum { MOST = 24 };
typedef int (*forward)(void *, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64);
typedef i64 (*needed)(void *, i64, i64, i64, i64, i64, i64);

int main(int count, char **given) {
    void *library = count < 3 ? NULL : dlopen(given[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) fail("no library", dlerror());
    int (*create)(const options *, void **) = (int (*)(const options *, void **))symbol(library, given[2], "create");
    void (*destroy)(void *) = (void (*)(void *))symbol(library, given[2], "destroy");
    const char *(*message)(void *) = (const char *(*)(void *))symbol(library, given[2], "message");
    int (*set_scratch)(void *, void *, i64) = (int (*)(void *, void *, i64))symbol(library, given[2], "set_scratch");
    forward run = (forward)symbol(library, given[2], "forward");
    needed scratch_bytes = (needed)symbol(library, given[2], "forward_scratch_bytes");
    array weights = {0};
    if (count > 3) {
        FILE *file = fopen(given[3], "rb");
        if (!file) fail("no file", given[3]);
        fseek(file, 0, SEEK_END);
        weights = make(ftell(file), ftell(file) % 64 == 0);
        rewind(file);
        if (fread(weights.at, 1, weights.bytes, file) != weights.bytes) fail("cannot read", given[3]);
        fclose(file);
        keep(weights);
    }
    for (int c; (c = getchar()) != EOF;) {
        ungetc(c, stdin);
        i64 threads = number(), sizes = number(), a[MOST] = {0};
        for (i64 k = 0; k < sizes; k++) a[k] = number();
        i64 inputs = number(), outputs = number(), bytes[MOST];
        if (sizes > 6 || sizes + inputs + outputs > MOST) fail("too many arguments", "");
        for (i64 k = 0; k < inputs + outputs; k++) bytes[k] = number();
        unsigned char *content[MOST], *first[MOST];
        for (i64 k = 0; k < inputs; k++) take(content[k] = malloc(bytes[k] + 1), bytes[k]);
        for (int at_end = 1; at_end >= 0; at_end--) {
            options o = {threads, NULL, NULL, NULL, at_end ? weights.at : NULL};
            void *model;
            array arrays[MOST];
            int code = create(&o, &model);
            if (code) fail("create", code == 6 ? "wrong CPU" : "");
            for (i64 k = 0; k < inputs + outputs; k++) {
                arrays[k] = make(bytes[k], at_end);
                if (k < inputs) { if (bytes[k]) memcpy(arrays[k].at, content[k], bytes[k]); keep(arrays[k]); }
                a[sizes + k] = (i64)(intptr_t)arrays[k].at;
            }
            i64 need = scratch_bytes(model, a[0], a[1], a[2], a[3], a[4], a[5]);
            if (need < 0) fail("scratch_bytes", message(model));
            array scratch = make(need, 1);
            if (set_scratch(model, scratch.at, need)) fail("set_scratch", message(model));
            for (int again = 0; again < 2; again++) {
                if (run(model, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16],
                        a[17], a[18], a[19], a[20], a[21], a[22], a[23])) fail("forward", message(model));
                for (i64 k = inputs; k < inputs + outputs; k++) {
                    if (at_end && !again) {
                        fwrite(arrays[k].at, 1, bytes[k], stdout);
                        memcpy(first[k] = malloc(bytes[k] + 1), arrays[k].at, bytes[k]);
                    } else if (memcmp(first[k], arrays[k].at, bytes[k])) fail("another result", "");
                }
            }
            destroy(model);
            end(scratch);
            for (i64 k = 0; k < inputs + outputs; k++) end(arrays[k]);
        }
        for (i64 k = 0; k < inputs; k++) free(content[k]);
        for (i64 k = inputs; k < inputs + outputs; k++) free(first[k]);
    }
    if (weights.base) end(weights);
    dlclose(library);
    return 0;
}
