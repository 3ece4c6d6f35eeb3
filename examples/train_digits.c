/* Trains a classifier of handwritten digits without Python. Made ready by examples/export_digits.py, which writes digits.h, libdigits.so and
   digits.bin (1797 images of 64 floats, then their labels as int64_t), and says how to compile this. */
#include <stdio.h>
#include <stdlib.h>
#include "digits.h"

enum { IMAGES = 1797, PIXELS = 64, BATCH = 128, STEPS = 100 };

static float images[IMAGES][PIXELS];
static int64_t labels[IMAGES];

static void check(int result, const digits *model) {
    if (result != DIGITS_OK) {
        fprintf(stderr, "error %d: %s\n", result, digits_message(model));
        exit(1);
    }
}

int main(int argc, char **argv) {
    FILE *file = fopen("digits.bin", "rb");
    if (!file || fread(images, sizeof images, 1, file) != 1 || fread(labels, sizeof labels, 1, file) != 1) return 1;
    fclose(file);

    digits *model;
    check(digits_create(NULL, &model), NULL);
    check(digits_init(model, 0), model);
    if (argc > 2) check(digits_load(model, argv[2]), model); /* go on from a checkpoint */
    for (int step = 0; step < STEPS; step++) {
        int start = step * BATCH % (IMAGES - BATCH);
        float loss;
        check(digits_train_step(model, BATCH, images[start], &labels[start], &loss), model);
        printf("%a\n", loss);
    }
    if (argc > 1) check(digits_save(model, argv[1]), model);
    digits_destroy(model);
    return 0;
}
