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
    BAND = 128,      /* rows of a matrix that are a piece: sums of columns are kept for each, under a hundredth of it */
    BLOCK = 1 << 10, /* elements whose sums are taken in the dtype of the state, before they are added in double */
    LANES = 16,      /* sums that run side by side: spelled out, since no compiler may reorder additions by itself */
    ROWS = 4,        /* of a matrix, gathered side by side */
    NARROW = 256,    /* elements of narrow rows that are taken together; a row is narrow up to a quarter of it */
    AHEAD = 128,     /* elements */
    SUMS = 3,
    MOST_THREADS = 256
};
#define GOLDEN 0x9e3779b1u /* of lowbit.py */

/* What a sweep is told, as cpu.py has it; a rule leaves alone what it does not know. */
typedef struct {
    int64_t count;                                             /* of tensors */
    int64_t threads;                                           /* at most */
    const int64_t *size;                                       /* elements of each */
    const int64_t *rows, *samples, *stride;                    /* of each matrix; samples[i] lie stride[i] apart */
    void *const *tensors;                                      /* parameters, gradients, then each state in turn */
    const double *step_size, *decay, *root, *last_root, *bias; /* of each; decay: NULL for none */
    double grad_scale, beta1, beta2, eps, floor, grad_trust, square_trust, sample_rate, follow;
    int64_t reflect;
    const uint32_t *seeds; /* of each tensor, where parameters of 16 bits are rounded at random; else NULL */
    double *sums;         /* SUMS for each tensor */
    void *scratch;        /* what was gathered of matrices, */
    const int64_t *place; /* and where that of each begins */
} bucket;

/* Which elements of each tensor are looked at, as displacement.py has it: so many blocks of a length, so far apart. */
typedef struct {
    int64_t count; /* of tensors */
    const int64_t *blocks, *length, *apart;
} sampling;

/* Sweeps what one piece is, from `start` on: n elements, or rows. */
typedef void piece_body(const bucket *b, int64_t tensor, int64_t start, int64_t n, double *sums);

typedef struct {
    const bucket *b;
    piece_body *body;
    const int64_t *extent; /* of each tensor, in elements or in rows; NULL: 1 */
    int64_t step;          /* of a piece; a tensor no larger than PIECE is one */
    int64_t *first;        /* piece of each tensor, and the number of pieces */
    double *partial;       /* SUMS for each piece */
    int64_t next;          /* piece to be taken */
} job;

static int64_t extent(const job *j, int64_t tensor)
{
    return j->extent ? j->extent[tensor] : 1;
}

static int64_t step(const job *j, int64_t tensor)
{
    const int64_t size = j->b->size[tensor];
    return size == 0 || size > PIECE ? j->step : extent(j, tensor);
}

/* Which tensor a piece belongs to. */
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
        int64_t tensor = owner(j, piece), most = step(j, tensor);
        int64_t start = (piece - j->first[tensor]) * most;
        int64_t left = extent(j, tensor) - start;
        j->body(j->b, tensor, start, left < most ? left : most, j->partial + SUMS * piece);
    }
}

/* Threads are made for each sweep: they cost some ten microseconds each, a sweep that shares out takes milliseconds, and
   there is no pool to survive a fork or to fight with torch's own. One that cannot be made is one fewer. */
static void work_in_threads(job *j)
{
    pthread_t threads[MOST_THREADS];
    int64_t wanted = 0, made = 0;
    for (int64_t i = 0; i < j->b->count; i++)
        wanted += j->b->size[i];
    wanted /= PIECE; /* a thread for less costs more than it saves */
    wanted = wanted < MOST_THREADS ? wanted : MOST_THREADS;
    wanted = wanted < j->b->threads ? wanted : j->b->threads;
    while (made < wanted - 1 && pthread_create(&threads[made], NULL, work, j) == 0)
        made++;
    work(j);
    while (made > 0)
        pthread_join(threads[--made], NULL);
}

/* Do a job in pieces, and add up what the pieces of each tensor give. Returns 0, or 1 where there is no memory; nothing
   was touched then. */
static int sweep(job j)
{
    const bucket *b = j.b;
    j.first = malloc((size_t)(b->count + 1) * sizeof *j.first);
    if (j.first == NULL)
        return 1;
    j.first[0] = 0;
    for (int64_t i = 0; i < b->count; i++)
        j.first[i + 1] = j.first[i] + (extent(&j, i) + step(&j, i) - 1) / step(&j, i);
    j.partial = calloc((size_t)(SUMS * j.first[b->count] + 1), sizeof *j.partial);
    if (j.partial == NULL) {
        free(j.first);
        return 1;
    }
    work_in_threads(&j);
    for (int64_t i = 0; i < b->count; i++)
        for (int64_t piece = j.first[i]; piece < j.first[i + 1]; piece++)
            for (int k = 0; k < SUMS; k++)
                b->sums[SUMS * i + k] += j.partial[SUMS * piece + k];
    free(j.partial);
    free(j.first);
    return 0;
}

static int sweep_elements(const bucket *b, piece_body *body)
{
    return sweep((job){.b = b, .body = body, .extent = b->size, .step = PIECE});
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

/* Random bits for what is stored from an element on, the same as those of lowbit.py; to the nearest without. */
typedef struct {
    uint32_t first;
    int random;
} rounding;

static inline rounding rounding_of(const bucket *b, int64_t tensor)
{
    return (rounding){.first = b->seeds ? b->seeds[tensor] : 0, .random = b->seeds != NULL};
}

static inline rounding after(rounding r, int64_t elements)
{
    r.first += (uint32_t)elements * GOLDEN;
    return r;
}

static inline uint32_t bits_of(rounding r, int64_t element)
{
    const uint32_t x = r.first + (uint32_t)element * GOLDEN;
    return (x ^ (x >> 15)) * (GOLDEN * GOLDEN);
}

/* Adds as many random bits as are cut off. */
static inline float cut(float value, uint32_t random, int dropped)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = (bits + (random >> (32 - dropped))) & (0xffffffffu << dropped);
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* One rounding where the processor has it, and two elsewhere; so is torch's lerp. */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define MULTIPLY_ADD(a, b, c) _Generic(a, float: fmaf, default: fma)(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif
/* 1 / x to the last bit or two, for x from 1e-37 to 1e37: a guess from the exponent, within an eighth, and three rounds
   of Newton's. Dividing is what the Adam rule waits for; the sums of reflection do with less. */
static inline float reciprocal(float x)
{
    uint32_t bits;
    float y;
    memcpy(&bits, &x, sizeof bits);
    bits = 0x7ef311c7 - bits;
    memcpy(&y, &bits, sizeof y);
    y *= MULTIPLY_ADD(-x, y, 2);
    y *= MULTIPLY_ADD(-x, y, 2);
    return y * MULTIPLY_ADD(-x, y, 2);
}

/* Asks for what comes AHEAD: of three or four streams with much to compute the processor does not look far enough by
   itself. A fifth of the Adam rule's time for a large matrix, a tenth of the Lion rule's. */
#define PREFETCH(at) __builtin_prefetch((at) + AHEAD, 1)
#define SIGN(x) ((x) > 0 ? 1 : (x) < 0 ? -1 : (x)) /* of NaN it is NaN */
#define SAME(x) (x)

#define NAME(rule) rule##_float32
#define STORED float
#define WIDE float
#define GET SAME
#define PUT SAME
#define DROPPED 0
#define ROOT sqrtf
#define ABS fabsf
#define RECIPROCAL reciprocal
#include "rules.h"

#define NAME(rule) rule##_float64
#define STORED double
#define WIDE double
#define GET SAME
#define PUT SAME
#define DROPPED 0
#define ROOT sqrt
#define ABS fabs
#define RECIPROCAL(x) (1 / (x))
#include "rules.h"

#define NAME(rule) rule##_bfloat16
#define STORED uint16_t
#define WIDE float
#define GET from_bfloat16
#define PUT to_bfloat16
#define DROPPED 16
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
#define DROPPED 13
#define ROOT sqrtf
#define ABS fabsf
#define RECIPROCAL reciprocal
#include "rules.h"
#endif

/* What each tensor keeps for itself, one number each: read into a vector, and written back. */
void read_numbers(int64_t count, float *const *numbers, double *values)
{
    for (int64_t i = 0; i < count; i++)
        values[i] = (double)*numbers[i];
}

void write_numbers(int64_t count, float *const *numbers, const double *values)
{
    for (int64_t i = 0; i < count; i++)
        *numbers[i] = (float)values[i];
}

/* Sets where in the scratch what is gathered of each matrix begins, and behind the last where it ends. Columns are read
   in whole LANES. */
void places(int64_t count, const int64_t *size, const int64_t *rows, int64_t *place)
{
    place[0] = 0;
    for (int64_t i = 0; i < count; i++)
        place[i + 1] = place[i] + rows[i] + size[i] / rows[i] * ((rows[i] + BAND - 1) / BAND) + LANES;
}
