/* The rules for one dtype. sweep.c includes this once for each, with

     STORED, GET, PUT   how parameters and gradients are stored, and the way from and to WIDE
     WIDE, ROOT, ABS, RECIPROCAL   how states are stored and what is computed in, and functions of it
     NAME(rule)         the rule's name for this dtype

   A piece is n elements of one tensor from `start` on. It goes block by block: first the sums of reflection, then the
   move. The operations are those of the functional form, in its order; but a division by a constant is a multiplication
   by its reciprocal, and nothing is contracted, so that results differ by a few roundings.

   Sums run in LANES of WIDE over a block, where each has the error of BLOCK / LANES additions, and from there on in
   double. The order is written down here, so that neither compiler nor processor changes a bit. */

static inline double NAME(total)(const WIDE lanes[LANES])
{
    double sum = 0;
    for (int k = 0; k < LANES; k++)
        sum += (double)lanes[k];
    return sum;
}

/* The Adam rule (navi.py) -------------------------------------------------------------------------------------------*/

typedef struct {
    WIDE scale, eps, per_last_root, per_root, decay, step_size, rest1, beta2, rest2, grad_trust, square_trust;
    int reflect;
} NAME(navi);

/* Moves n elements, at most LANES of them where it reflects. */
static inline void NAME(navi_some)(STORED *param, const STORED *grad, WIDE *exp_avg, WIDE *exp_avg_sq, int64_t n,
                                   const NAME(navi) c, WIDE lanes[SUMS][LANES])
{
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
        const WIDE g = GET(grad[k]) * c.scale, m = exp_avg[k], v = exp_avg_sq[k];
        if (c.reflect) {
            const WIDE per_denom = RECIPROCAL(ROOT(v) * c.per_last_root + c.eps);
            lanes[0][k] += g * (m * per_denom);
            lanes[1][k] += g * (g * per_denom);
            lanes[2][k] += m * (m * per_denom);
        }
        const WIDE new_m = MULTIPLY_ADD(c.rest1, g * c.grad_trust - m, m);
        const WIDE new_v = v * c.beta2 + c.rest2 * (g * c.square_trust) * g;
        const WIDE step = new_m / (ROOT(new_v) * c.per_root + c.eps);
        exp_avg[k] = new_m;
        exp_avg_sq[k] = new_v;
        param[k] = PUT(GET(param[k]) * c.decay - c.step_size * step);
    }
}

static void NAME(navi_piece)(const bucket *b, int64_t tensor, int64_t start, int64_t n, double *sums)
{
    STORED *param = (STORED *)b->tensors[tensor] + start;
    const STORED *grad = (const STORED *)b->tensors[b->count + tensor] + start;
    WIDE *exp_avg = (WIDE *)b->tensors[2 * b->count + tensor] + start;
    WIDE *exp_avg_sq = (WIDE *)b->tensors[3 * b->count + tensor] + start;
    NAME(navi) c = {
        .scale = (WIDE)b->grad_scale, .eps = (WIDE)b->eps, .per_last_root = (WIDE)(1 / b->last_root[tensor]),
        .per_root = (WIDE)(1 / b->root[tensor]), .decay = b->decay ? (WIDE)b->decay[tensor] : 1,
        .step_size = (WIDE)b->step_size[tensor], .rest1 = (WIDE)(1 - b->beta1), .beta2 = (WIDE)b->beta2,
        .rest2 = (WIDE)(1 - b->beta2), .grad_trust = (WIDE)b->grad_trust, .square_trust = (WIDE)b->square_trust};
    if (!b->reflect) {
        NAME(navi_some)(param, grad, exp_avg, exp_avg_sq, n, c, NULL);
        return;
    }
    c.reflect = 1;
    for (int64_t i = 0; i < n;) {
        const int64_t to = n - i < BLOCK ? n : i + BLOCK;
        WIDE lanes[SUMS][LANES] = {{0}};
        for (; i + LANES <= to; i += LANES) {
            PREFETCH(param + i), PREFETCH(grad + i), PREFETCH(exp_avg + i), PREFETCH(exp_avg_sq + i);
            NAME(navi_some)(param + i, grad + i, exp_avg + i, exp_avg_sq + i, LANES, c, lanes);
        }
        NAME(navi_some)(param + i, grad + i, exp_avg + i, exp_avg_sq + i, to - i, c, lanes);
        i = to;
        for (int s = 0; s < SUMS; s++)
            sums[s] += NAME(total)(lanes[s]);
    }
}

int NAME(emonavi)(const bucket *b)
{
    return sweep_elements(b, NAME(navi_piece));
}

/* The Lion rule (lynx.py) -------------------------------------------------------------------------------------------*/

typedef struct {
    WIDE scale, decay, step_size, blend, rest2, trust;
    int from_grad, reflect;
} NAME(lynx);

static inline void NAME(lynx_some)(STORED *param, const STORED *grad, WIDE *exp_avg, int64_t n, const NAME(lynx) c,
                                   WIDE lanes[2][LANES])
{
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
        const WIDE g = GET(grad[k]) * c.scale, m = exp_avg[k];
        if (c.reflect) {
            lanes[0][k] += SIGN(m) * g;
            lanes[1][k] += ABS(g);
        }
        const WIDE memory = m * c.trust;
        const WIDE blended = MULTIPLY_ADD(c.blend, memory - g, c.from_grad ? g : memory);
        const WIDE direction = SIGN(blended);
        param[k] = PUT(GET(param[k]) * c.decay - c.step_size * direction);
        exp_avg[k] = MULTIPLY_ADD(c.rest2, g - m, m);
    }
}

static void NAME(lynx_piece)(const bucket *b, int64_t tensor, int64_t start, int64_t n, double *sums)
{
    STORED *param = (STORED *)b->tensors[tensor] + start;
    const STORED *grad = (const STORED *)b->tensors[b->count + tensor] + start;
    WIDE *exp_avg = (WIDE *)b->tensors[2 * b->count + tensor] + start;
    NAME(lynx) c = {
        .scale = (WIDE)b->grad_scale, .decay = b->decay ? (WIDE)b->decay[tensor] : 1,
        .step_size = (WIDE)b->step_size[tensor], .rest2 = (WIDE)(1 - b->beta2), .trust = (WIDE)b->grad_trust,
        .from_grad = b->beta1 < 0.5};
    c.blend = c.from_grad ? (WIDE)b->beta1 : (WIDE)b->beta1 - 1; /* a sign may hang on it: as lerp has it */
    if (!b->reflect) {
        NAME(lynx_some)(param, grad, exp_avg, n, c, NULL);
        return;
    }
    c.reflect = 1;
    for (int64_t i = 0; i < n;) {
        const int64_t to = n - i < BLOCK ? n : i + BLOCK;
        WIDE lanes[2][LANES] = {{0}};
        for (; i + LANES <= to; i += LANES)
            NAME(lynx_some)(param + i, grad + i, exp_avg + i, LANES, c, lanes);
        NAME(lynx_some)(param + i, grad + i, exp_avg + i, to - i, c, lanes);
        i = to;
        sums[0] += NAME(total)(lanes[0]);
        sums[1] += NAME(total)(lanes[1]);
    }
    sums[2] = sums[1];
}

int NAME(emolynx)(const bucket *b)
{
    return sweep_elements(b, NAME(lynx_piece));
}

/* The Adafactor rule of matrices (fact.py) --------------------------------------------------------------------------*/

/* Memories of n rows or columns after today's sums of squares, each of `count` elements. */
static inline void NAME(remember)(const bucket *b, WIDE *memories, const double *sums, int64_t n, int64_t count)
{
    const double per_count = 1 / (double)count;
    const WIDE floor = (WIDE)b->floor, trust = (WIDE)b->grad_trust, rest1 = (WIDE)(1 - b->beta1);
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
        const WIDE today = ROOT((WIDE)(sums[k] * per_count) + floor) * trust;
        memories[k] += rest1 * (today - memories[k]);
    }
}

/* The squares of LANES elements of a row: into the sum of the row and those of the columns. */
static inline void NAME(fact_some)(const STORED *grad, WIDE scale, WIDE lanes[LANES], WIDE *columns)
{
#pragma omp simd
    for (int k = 0; k < LANES; k++) {
        const WIDE g = GET(grad[k]) * scale;
        lanes[k] += g * g;
        columns[k] += g * g;
    }
}

/* Sums of squares of n wide rows, and of their columns. */
static void NAME(fact_wide)(const STORED *grad, WIDE scale, int64_t n, int64_t width, double *rows, WIDE *columns)
{
    memset(columns, 0, (size_t)width * sizeof *columns);
    for (int64_t r = 0; r < n; r++, grad += width) {
        double sum = 0;
        int64_t i = 0;
        while (i + LANES <= width) {
            const int64_t to = width - i < BLOCK ? width : i + BLOCK;
            WIDE lanes[LANES] = {0};
            for (; i + LANES <= to; i += LANES)
                NAME(fact_some)(grad + i, scale, lanes, columns + i);
            sum += NAME(total)(lanes);
        }
        for (; i < width; i++) {
            const WIDE g = GET(grad[i]) * scale;
            sum += (double)(g * g);
            columns[i] += g * g;
        }
        rows[r] = sum;
    }
}

/* The same of narrow rows, some at a time, which stand in for one that is wide. */
static void NAME(fact_narrow)(const STORED *grad, WIDE scale, int64_t n, int64_t width, double *rows, WIDE *columns)
{
    const int64_t some = NARROW / width;
    WIDE squares[NARROW], totals[NARROW] = {0};
    for (int64_t r = 0; r < n; r += some) {
        const int64_t here = n - r < some ? n - r : some;
#pragma omp simd
        for (int64_t k = 0; k < here * width; k++) {
            const WIDE g = GET(grad[r * width + k]) * scale;
            squares[k] = g * g;
            totals[k] += g * g;
        }
        for (int64_t k = 0; k < here; k++) {
            WIDE sum = 0;
            for (int64_t i = 0; i < width; i++)
                sum += squares[k * width + i];
            rows[r + k] = (double)sum;
        }
    }
    for (int64_t i = 0; i < width; i++) {
        columns[i] = 0;
        for (int64_t k = 0; k < some; k++)
            columns[i] += totals[k * width + i];
    }
}

static void NAME(fact_gather)(const bucket *b, int64_t tensor, int64_t start, int64_t n, double *sums)
{
    const int64_t width = b->size[tensor] / b->rows[tensor];
    const STORED *grad = (const STORED *)b->tensors[b->count + tensor] + start * width;
    WIDE *row = (WIDE *)b->tensors[2 * b->count + tensor] + start;
    WIDE *columns = (WIDE *)b->scratch + b->place[tensor] + start / BAND * width;
    double rows[BAND];
    (void)sums;
    (width < 2 * LANES ? NAME(fact_narrow) : NAME(fact_wide))(grad, (WIDE)b->grad_scale, n, width, rows, columns);
    NAME(remember)(b, row, rows, n, width);
}

/* The denominators of n elements that follow each other, from column i of a row on; its root and those of the columns
   are multiplied. */
static inline void NAME(fact_denoms)(const WIDE *row, const WIDE *roots, int64_t i, int64_t n, int64_t width,
                                     WIDE per_bias, WIDE eps, WIDE *denom)
{
    for (int64_t k = 0; k < n; row++, i = 0) {
        const WIDE factor = ROOT(*row) * per_bias;
        const int64_t some = n - k < width - i ? n - k : width - i;
        if (some < LANES) {
#pragma omp simd simdlen(4)
            for (int64_t c = 0; c < some; c++)
                denom[k + c] = factor * roots[i + c] + eps;
        } else {
#pragma omp simd
            for (int64_t c = 0; c < some; c++)
                denom[k + c] = factor * roots[i + c] + eps;
        }
        k += some;
    }
}

/* The sums of reflection of n coordinates of a sample, BLOCK at most, and what is remembered of them. */
static inline void NAME(fact_reflect)(WIDE *sample, const WIDE *grad, const WIDE *denom, int64_t n, WIDE rate,
                                      double *sums)
{
    WIDE lanes[SUMS][LANES] = {{0}};
    for (int64_t i = 0; i < n; i += LANES) {
        const int64_t some = n - i < LANES ? n - i : LANES;
#pragma omp simd
        for (int64_t k = 0; k < some; k++) {
            const WIDE g = grad[i + k], m = sample[i + k], per_denom = 1 / denom[i + k];
            lanes[0][k] += m * (g * per_denom);
            lanes[1][k] += g * (g * per_denom);
            lanes[2][k] += m * (m * per_denom);
            sample[i + k] = m + rate * (g - m);
        }
    }
    for (int s = 0; s < SUMS; s++)
        sums[s] += NAME(total)(lanes[s]);
}

/* Bands meet: the memory of columns, whose roots are left in the scratch, and then the sample that reflection takes. */
static void NAME(fact_meet)(const bucket *b, int64_t tensor, int64_t start, int64_t n, double *sums)
{
    const int64_t rows = b->rows[tensor], width = b->size[tensor] / rows;
    const STORED *grad = (const STORED *)b->tensors[b->count + tensor];
    const WIDE *row = (const WIDE *)b->tensors[2 * b->count + tensor];
    WIDE *column = (WIDE *)b->tensors[3 * b->count + tensor];
    WIDE *columns = (WIDE *)b->scratch + b->place[tensor];
    (void)start, (void)n;
    for (int64_t from = 0; from < width; from += BLOCK) {
        const int64_t some = width - from < BLOCK ? width - from : BLOCK;
        double sum[BLOCK] = {0};
        for (int64_t band = 0; band * BAND < rows; band++)
            for (int64_t k = 0; k < some; k++)
                sum[k] += (double)columns[band * width + from + k];
        NAME(remember)(b, column + from, sum, some, rows);
#pragma omp simd
        for (int64_t k = 0; k < some; k++)
            columns[from + k] = ROOT(column[from + k]);
    }
    if (!b->reflect)
        return;
    const WIDE scale = (WIDE)b->grad_scale, eps = (WIDE)b->eps, per_bias = (WIDE)(1 / b->bias[tensor]);
    const int64_t samples = b->samples[tensor], stride = b->stride[tensor];
    WIDE *sample = (WIDE *)b->tensors[4 * b->count + tensor];
    WIDE sampled[BLOCK], denom[BLOCK];
    for (int64_t done = 0, at = 0; done < samples; done += BLOCK) {
        const int64_t some = samples - done < BLOCK ? samples - done : BLOCK;
        if (stride == 1)
            NAME(fact_denoms)(row + done / width, columns, done % width, some, width, per_bias, eps, denom);
        for (int64_t k = 0; k < some; k++, at += stride) {
            sampled[k] = GET(grad[at]) * scale;
            if (stride > 1)
                denom[k] = ROOT(row[at / width]) * per_bias * columns[at % width] + eps;
        }
        NAME(fact_reflect)(sample + done, sampled, denom, some, (WIDE)b->sample_rate, sums);
    }
    for (int s = 0; s < SUMS; s++)
        sums[s] *= (double)b->size[tensor] / (double)b->samples[tensor];
}

/* Moves n elements that follow each other, whichever rows they are of. */
static inline void NAME(fact_step)(STORED *param, const STORED *grad, const WIDE *denom, int64_t n, WIDE scale,
                                   WIDE decay, WIDE step_size)
{
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
        const WIDE step = GET(grad[k]) * scale / denom[k];
        param[k] = PUT(GET(param[k]) * decay - step_size * step);
    }
}

static void NAME(fact_move)(const bucket *b, int64_t tensor, int64_t start, int64_t n, double *sums)
{
    const int64_t width = b->size[tensor] / b->rows[tensor];
    STORED *param = (STORED *)b->tensors[tensor] + start * width;
    const STORED *grad = (const STORED *)b->tensors[b->count + tensor] + start * width;
    const WIDE *row = (const WIDE *)b->tensors[2 * b->count + tensor] + start;
    const WIDE *roots = (const WIDE *)b->scratch + b->place[tensor];
    const WIDE scale = (WIDE)b->grad_scale, eps = (WIDE)b->eps, step_size = (WIDE)b->step_size[tensor];
    const WIDE decay = b->decay ? (WIDE)b->decay[tensor] : 1, per_bias = (WIDE)(1 / b->bias[tensor]);
    WIDE denom[BLOCK];
    (void)sums;
    for (int64_t at = 0; at < n * width; at += BLOCK) {
        const int64_t some = n * width - at < BLOCK ? n * width - at : BLOCK;
        NAME(fact_denoms)(row + at / width, roots, at % width, some, width, per_bias, eps, denom);
        NAME(fact_step)(param + at, grad + at, denom, some, scale, decay, step_size);
    }
}

/* All three for a small matrix, which so stays in the caches nearest by. */
static void NAME(fact_whole)(const bucket *b, int64_t tensor, int64_t start, int64_t n, double *sums)
{
    const int64_t rows = b->rows[tensor];
    (void)start, (void)n;
    for (int64_t r = 0; r < rows; r += BAND)
        NAME(fact_gather)(b, tensor, r, rows - r < BAND ? rows - r : BAND, sums);
    NAME(fact_meet)(b, tensor, 0, 1, sums);
    NAME(fact_move)(b, tensor, 0, rows, sums);
}

int NAME(emofact)(const bucket *b)
{
    return sweep_matrices(b, sizeof(WIDE), NAME(fact_whole), NAME(fact_gather), NAME(fact_meet), NAME(fact_move));
}

/* The guard: sums of squares ----------------------------------------------------------------------------------------*/

static inline void NAME(square_some)(const STORED *grad, int64_t n, WIDE lanes[LANES])
{
#pragma omp simd
    for (int64_t k = 0; k < n; k++)
        lanes[k] += GET(grad[k]) * GET(grad[k]);
}

static void NAME(square_piece)(const bucket *b, int64_t tensor, int64_t start, int64_t n, double *sums)
{
    const STORED *grad = (const STORED *)b->tensors[tensor] + start;
    for (int64_t i = 0; i < n;) {
        const int64_t to = n - i < BLOCK ? n : i + BLOCK;
        WIDE lanes[LANES] = {0};
        for (; i + LANES <= to; i += LANES)
            NAME(square_some)(grad + i, LANES, lanes);
        NAME(square_some)(grad + i, to - i, lanes);
        i = to;
        sums[0] += NAME(total)(lanes);
    }
}

int NAME(squares)(const bucket *b)
{
    return sweep_elements(b, NAME(square_piece));
}

#undef NAME
#undef STORED
#undef WIDE
#undef GET
#undef PUT
#undef ROOT
#undef ABS
#undef RECIPROCAL
