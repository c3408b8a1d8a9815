/* The sweeps of the rules over a whole bucket, for the CPU: plain C, compiled once on first use (build.py).

   A bucket is cut into pieces. What a piece adds to the sums of its tensor is kept apart and added in the order of the
   pieces, so that the result is the same, bit by bit, whatever the number of threads. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    PIECE = 1 << 16, /* elements: enough to be worth a thread's while, few enough to share out evenly */
    BLOCK = 1 << 10, /* elements: what is read from memory once stays in the L1 cache for every loop over it */
    LANES = 16,      /* sums that run side by side, by hand: a compiler may not reorder additions, and must not */
    SUMS = 3,
    MOST_THREADS = 256
};

/* What a sweep is told; the fields are those of cpu.py, and a rule leaves alone what it does not know. */
typedef struct {
    int64_t count;         /* of tensors */
    int64_t threads;       /* at most */
    const int64_t *size;   /* elements of each */
    void *const *tensors;  /* count parameters, then as many gradients, then each of the states in turn */
    const double *step_size, *decay, *root, *last_root; /* of each; decay: NULL for none */
    double grad_scale, beta1, beta2, eps, grad_trust, square_trust;
    int64_t reflect;
    double *sums;          /* SUMS for each tensor */
} bucket;

typedef void piece_body(const bucket *b, int64_t tensor, int64_t start, int64_t n, double *sums);

typedef struct {
    const bucket *b;
    piece_body *body;
    const int64_t *first; /* piece of each tensor; and of the one after the last, their number */
    double *partial;      /* SUMS for each piece */
    int64_t next;         /* piece to be taken */
} job;

static int64_t owner(const job *j, int64_t piece)
{
    int64_t low = 0, high = j->b->count;
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (j->first[middle] <= piece)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static void *work(void *argument)
{
    job *j = argument;
    for (;;) {
        int64_t piece = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED);
        if (piece >= j->first[j->b->count])
            return NULL;
        int64_t tensor = owner(j, piece);
        int64_t start = (piece - j->first[tensor]) * PIECE;
        int64_t left = j->b->size[tensor] - start;
        j->body(j->b, tensor, start, left < PIECE ? left : PIECE, j->partial + SUMS * piece);
    }
}

/* Threads are made for each sweep: they cost some ten microseconds each, a sweep that shares out takes milliseconds, and
   there is no pool to survive a fork or to fight with torch's own. One that cannot be made is one fewer. */
static void work_in_threads(job *j)
{
    pthread_t threads[MOST_THREADS];
    int64_t pieces = j->first[j->b->count], wanted = j->b->threads, made = 0;
    wanted = wanted < MOST_THREADS ? wanted : MOST_THREADS;
    wanted = wanted < pieces ? wanted : pieces;
    while (made < wanted - 1 && pthread_create(&threads[made], NULL, work, j) == 0)
        made++;
    work(j);
    while (made > 0)
        pthread_join(threads[--made], NULL);
}

/* Sweep all tensors in pieces. Returns 0, or 1 where there is no memory, and nothing was touched then. */
static int sweep(const bucket *b, piece_body *body)
{
    int64_t *first = malloc((size_t)(b->count + 1) * sizeof *first);
    if (first == NULL)
        return 1;
    first[0] = 0;
    for (int64_t i = 0; i < b->count; i++)
        first[i + 1] = first[i] + (b->size[i] + PIECE - 1) / PIECE;
    double *partial = calloc((size_t)(SUMS * first[b->count] + 1), sizeof *partial);
    if (partial == NULL) {
        free(first);
        return 1;
    }
    job j = {b, body, first, partial, 0};
    /* A thread for less than some pieces costs more than it saves. */
    if (first[b->count] - b->count < 2) {
        bucket alone = *b;
        alone.threads = 1;
        j.b = &alone;
        work_in_threads(&j);
    } else
        work_in_threads(&j);
    for (int64_t i = 0; i < b->count; i++)
        for (int k = 0; k < SUMS; k++) {
            double sum = 0;
            for (int64_t piece = first[i]; piece < first[i + 1]; piece++)
                sum += partial[SUMS * piece + k];
            b->sums[SUMS * i + k] = sum;
        }
    free(partial);
    free(first);
    return 0;
}

static inline float from_bfloat16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static inline uint16_t to_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even */
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

/* 1 / x to the last bit or two, for x from 1e-37 to 1e37: a guess from the exponent, within an eighth, and three rounds
   of Newton's. Dividing is what the Adam rule waits for; the sums of reflection do with less. */
static inline float reciprocal(float x)
{
    uint32_t bits;
    float y;
    memcpy(&bits, &x, sizeof bits);
    bits = 0x7ef311c7 - bits;
    memcpy(&y, &bits, sizeof y);
    y *= 2 - x * y;
    y *= 2 - x * y;
    return y * (2 - x * y);
}

#define SIGN(x) ((x) > 0 ? 1 : (x) < 0 ? -1 : (x)) /* of NaN it is NaN */
#define SAME(x) (x)

#define NAME(rule) rule##_float32
#define STORED float
#define WIDE float
#define GET SAME
#define PUT SAME
#define ROOT sqrtf
#define ABS fabsf
#define RECIPROCAL reciprocal
#include "rules.h"

#define NAME(rule) rule##_float64
#define STORED double
#define WIDE double
#define GET SAME
#define PUT SAME
#define ROOT sqrt
#define ABS fabs
#define RECIPROCAL(x) (1 / (x))
#include "rules.h"

#define NAME(rule) rule##_bfloat16
#define STORED uint16_t
#define WIDE float
#define GET from_bfloat16
#define PUT to_bfloat16
#define ROOT sqrtf
#define ABS fabsf
#define RECIPROCAL reciprocal
#include "rules.h"

#ifdef __FLT16_MAX__
#define NAME(rule) rule##_float16
#define STORED _Float16
#define WIDE float
#define GET (float)
#define PUT (_Float16)
#define ROOT sqrtf
#define ABS fabsf
#define RECIPROCAL reciprocal
#include "rules.h"
#endif
