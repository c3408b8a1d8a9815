/* The rules for one dtype. sweep.c includes this once for each, with

     STORED, GET, PUT   how parameters and gradients are stored, and the way from and to WIDE
     DROPPED            bits of WIDE that are lost on the way to it
     WIDE, ROOT, ABS, RECIPROCAL   how states are stored and what is computed in, and functions of it
     NAME(rule)         the rule's name for this dtype

   A piece is n elements of one tensor from `start` on. It goes block by block: first the sums of reflection, then the
   move. The operations are those of the functional form, in its order; but a division by a constant is a multiplication
   by its reciprocal, and of a product and a sum only what says so is one rounding, so that results differ by a few.

   Sums run in LANES of WIDE over a block, where each has the error of BLOCK / LANES additions, and from there on in
   double. The order is written down here, so that neither compiler nor processor changes a bit. */

static inline double NAME(total)(const WIDE lanes[LANES])
{
    double halves[LANES / 2], quarters[LANES / 4], sum = 0;
    for (int k = 0; k < LANES / 2; k++)
        halves[k] = (double)lanes[k] + (double)lanes[k + LANES / 2];
    for (int k = 0; k < LANES / 4; k++)
        quarters[k] = halves[k] + halves[k + LANES / 4];
    for (int k = 0; k < LANES / 4; k++)
        sum += quarters[k];
    return sum;
}

static inline STORED NAME(put)(WIDE value, rounding r, int64_t element)
{
    return PUT(DROPPED && r.random ? (WIDE)cut((float)value, bits_of(r, element), DROPPED) : value);
}

/* The Adam rule (navi.py) -------------------------------------------------------------------------------------------*/

typedef struct {
    WIDE scale, eps, per_last_root, per_root, decay, step_size, rest1, beta2, rest2, grad_trust;
    int reflect;
} NAME(navi);

/* Moves n elements, at most LANES of them where it reflects. */
static inline void NAME(navi_some)(STORED *param, const STORED *grad, WIDE *exp_avg, WIDE *exp_avg_sq, int64_t n,
                                   const NAME(navi) c, rounding r, WIDE lanes[SUMS][LANES])
{
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
        const WIDE g = GET(grad[k]) * c.scale, m = exp_avg[k], v = exp_avg_sq[k];
        if (c.reflect) {
            const WIDE per_denom = RECIPROCAL(MULTIPLY_ADD(ROOT(v), c.per_last_root, c.eps));
            const WIDE last = m * per_denom;
            lanes[0][k] = MULTIPLY_ADD(g, last, lanes[0][k]);
            lanes[1][k] = MULTIPLY_ADD(g, g * per_denom, lanes[1][k]);
            lanes[2][k] = MULTIPLY_ADD(m, last, lanes[2][k]);
        }
        const WIDE new_m = MULTIPLY_ADD(c.rest1, g * c.grad_trust - m, m);
        const WIDE new_v = MULTIPLY_ADD(c.rest2 * g, g, v * c.beta2);
        const WIDE step = new_m / MULTIPLY_ADD(ROOT(new_v), c.per_root, c.eps);
        exp_avg[k] = new_m;
        exp_avg_sq[k] = new_v;
        param[k] = NAME(put)(MULTIPLY_ADD(-c.step_size, step, GET(param[k]) * c.decay), r, k);
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
        .rest2 = (WIDE)((1 - b->beta2) * b->square_trust), .grad_trust = (WIDE)b->grad_trust};
    const rounding r = after(rounding_of(b, tensor), start);
    if (!b->reflect) {
        NAME(navi_some)(param, grad, exp_avg, exp_avg_sq, n, c, r, NULL);
        return;
    }
    c.reflect = 1;
    for (int64_t i = 0; i < n;) {
        const int64_t to = n - i < BLOCK ? n : i + BLOCK;
        WIDE lanes[SUMS][LANES] = {{0}};
        for (; i + LANES <= to; i += LANES) {
            PREFETCH(param + i), PREFETCH(grad + i), PREFETCH(exp_avg + i), PREFETCH(exp_avg_sq + i);
            NAME(navi_some)(param + i, grad + i, exp_avg + i, exp_avg_sq + i, LANES, c, after(r, i), lanes);
        }
        NAME(navi_some)(param + i, grad + i, exp_avg + i, exp_avg_sq + i, to - i, c, after(r, i), lanes);
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
                                   rounding r, WIDE lanes[2][LANES])
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
        param[k] = NAME(put)(GET(param[k]) * c.decay - c.step_size * direction, r, k);
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
    const rounding r = after(rounding_of(b, tensor), start);
    if (!b->reflect) {
        NAME(lynx_some)(param, grad, exp_avg, n, c, r, NULL);
        return;
    }
    c.reflect = 1;
    for (int64_t i = 0; i < n;) {
        const int64_t to = n - i < BLOCK ? n : i + BLOCK;
        WIDE lanes[2][LANES] = {{0}};
        for (; i + LANES <= to; i += LANES) {
            PREFETCH(param + i), PREFETCH(grad + i), PREFETCH(exp_avg + i);
            NAME(lynx_some)(param + i, grad + i, exp_avg + i, LANES, c, after(r, i), lanes);
        }
        NAME(lynx_some)(param + i, grad + i, exp_avg + i, to - i, c, after(r, i), lanes);
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

/* The Adafactor rule of matrices (fact.py) --------------------------------------------------------------------------

   First the gradients are gathered, which the guard has to read in any case: means of squares of rows and sums of those
   of columns, as they come. How far the guard scales the gradients is known when all are; a mean changes by its square.
   In the scratch a matrix has its rows, then the columns of each band; in the end the factors of the denominator. */

static inline WIDE *NAME(fact_rows)(const bucket *b, int64_t tensor)
{
    return (WIDE *)b->scratch + b->place[tensor];
}

/* Squares of some rows, ROWS or 1 of them, so many elements apart: into the sum of each and those of the columns, which
   are fetched once for all. */
static inline void NAME(fact_some)(const STORED *grad, const int some, int64_t apart, int64_t width, double sums[ROWS],
                                   WIDE *columns)
{
    int64_t i = 0;
    for (int r = 0; r < some; r++)
        sums[r] = 0;
    while (i + LANES <= width) {
        const int64_t to = width - i < BLOCK ? width : i + BLOCK;
        WIDE lanes[ROWS][LANES] = {{0}};
        for (; i + LANES <= to; i += LANES) {
#pragma omp simd
            for (int k = 0; k < LANES; k++) {
                WIDE column = columns[i + k];
                for (int r = 0; r < some; r++) {
                    const WIDE g = GET(grad[r * apart + i + k]), square = g * g;
                    lanes[r][k] += square;
                    column += square;
                }
                columns[i + k] = column;
            }
        }
        for (int r = 0; r < some; r++)
            sums[r] += NAME(total)(lanes[r]);
    }
    for (; i < width; i++)
        for (int r = 0; r < some; r++) {
            const WIDE g = GET(grad[r * apart + i]);
            sums[r] += (double)(g * g);
            columns[i] += g * g;
        }
}

/* Means of squares of n wide rows, and sums of those of their columns; returns the sum of all. */
static double NAME(fact_wide)(const STORED *grad, int64_t n, int64_t width, WIDE *rows, WIDE *columns)
{
    const int64_t apart = n / ROWS;
    double sum = 0, sums[ROWS];
    memset(columns, 0, (size_t)width * sizeof *columns);
    for (int64_t r = 0; r < apart; r++) {
        NAME(fact_some)(grad + r * width, ROWS, apart * width, width, sums, columns);
        for (int k = 0; k < ROWS; k++) {
            rows[r + k * apart] = (WIDE)(sums[k] / (double)width);
            sum += sums[k];
        }
    }
    for (int64_t r = ROWS * apart; r < n; r++) {
        NAME(fact_some)(grad + r * width, 1, 0, width, sums, columns);
        rows[r] = (WIDE)(sums[0] / (double)width);
        sum += sums[0];
    }
    return sum;
}

/* The same of narrow rows, some at a time, which stand in for one that is wide. */
static double NAME(fact_narrow)(const STORED *grad, int64_t n, int64_t width, WIDE *rows, WIDE *columns)
{
    const int64_t some = NARROW / width;
    const WIDE per_width = 1 / (WIDE)width;
    WIDE squares[NARROW], totals[NARROW] = {0};
    double total = 0;
    for (int64_t r = 0; r < n; r += some) {
        const int64_t here = n - r < some ? n - r : some;
#pragma omp simd
        for (int64_t k = 0; k < here * width; k++) {
            const WIDE g = GET(grad[r * width + k]);
            squares[k] = g * g;
            totals[k] += g * g;
        }
        int64_t left = width; /* of each row: halved as long as that goes, which many can do side by side */
        for (; left % 2 == 0; left /= 2) {
            WIDE halves[NARROW / 2];
#pragma omp simd
            for (int64_t k = 0; k < here * left / 2; k++)
                halves[k] = squares[2 * k] + squares[2 * k + 1];
            memcpy(squares, halves, (size_t)(here * left / 2) * sizeof *halves);
        }
        for (int64_t k = 0; k < here && left > 1; k++) {
            WIDE sum = 0;
            for (int64_t i = 0; i < left; i++)
                sum += squares[k * left + i];
            squares[k] = sum;
        }
#pragma omp simd
        for (int64_t k = 0; k < here; k++)
            rows[r + k] = squares[k] * per_width;
    }
    for (int64_t left = some, half; left > 1; left = half) {
        half = (left + 1) / 2;
#pragma omp simd
        for (int64_t k = 0; k < (left - half) * width; k++)
            totals[k] += totals[half * width + k];
    }
    for (int64_t i = 0; i < width; i++) {
        columns[i] = totals[i];
        total += (double)totals[i];
    }
    return total;
}

static void NAME(fact_gather)(const bucket *b, int64_t tensor, int64_t start, int64_t n, double *sums)
{
    const int64_t width = b->size[tensor] / b->rows[tensor];
    const STORED *grad = (const STORED *)b->tensors[tensor];
    WIDE *rows = NAME(fact_rows)(b, tensor), *columns = rows + b->rows[tensor];
    for (int64_t r = start; r < start + n; r += BAND)
        sums[0] += (width < 2 * LANES ? NAME(fact_narrow) : NAME(fact_wide))(
            grad + r * width, start + n - r < BAND ? start + n - r : BAND, width, rows + r, columns + r / BAND * width);
}

int NAME(gather)(const bucket *b)
{
    return sweep((job){.b = b, .body = NAME(fact_gather), .extent = b->rows, .step = BAND});
}

/* Memories of n rows or columns after today's means of squares, in whose place are left the factors of the
   denominator. */
static inline void NAME(remember)(const bucket *b, WIDE *memories, WIDE *means, int64_t n, WIDE per_bias)
{
    const double square_scale = b->grad_scale * b->grad_scale;
    const WIDE floor = (WIDE)b->floor, trust = (WIDE)b->grad_trust, rest1 = (WIDE)(1 - b->beta1);
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
        const WIDE today = ROOT((WIDE)((double)means[k] * square_scale) + floor) * trust;
        memories[k] += rest1 * (today - memories[k]);
        means[k] = ROOT(memories[k]) * per_bias;
    }
}

/* The denominators of n elements that follow each other, from column i of a row on. Each row is written in whole LANES
   and the excess written over by the next one: there is room for it behind them. */
static inline void NAME(fact_denoms)(const WIDE *row, const WIDE *columns, int64_t i, int64_t n, int64_t width,
                                     WIDE eps, WIDE *denom)
{
    for (int64_t k = 0; k < n; row++, i = 0) {
        const WIDE factor = *row;
        const int64_t some = n - k < width - i ? n - k : width - i;
        for (int64_t c = 0; c < some; c += LANES) {
#pragma omp simd
            for (int64_t l = c; l < c + LANES; l++)
                denom[k + l] = factor * columns[i + l] + eps;
        }
        k += some;
    }
}

typedef struct {
    WIDE scale, eps, decay, step_size, rate;
    rounding r; /* of the first element that is moved */
} NAME(fact);

static inline NAME(fact) NAME(fact_scalars)(const bucket *b, int64_t tensor)
{
    return (NAME(fact)){.scale = (WIDE)b->grad_scale, .eps = (WIDE)b->eps, .step_size = (WIDE)b->step_size[tensor],
                        .decay = b->decay ? (WIDE)b->decay[tensor] : 1, .rate = (WIDE)b->sample_rate,
                        .r = rounding_of(b, tensor)};
}

/* The sums of reflection of n coordinates of a sample, at most LANES, and what is remembered of them; where they are
   all that there are, their parameters are moved, too. */
static inline void NAME(fact_reflect)(STORED *param, const STORED *grad, WIDE *sample, const WIDE *denom, int64_t at,
                                      int64_t n, NAME(fact) c, WIDE lanes[SUMS][LANES])
{
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
        const WIDE g = GET(grad[k]) * c.scale, m = sample[k], per_denom = 1 / denom[k];
        lanes[0][k] += m * (g * per_denom);
        lanes[1][k] += g * (g * per_denom);
        lanes[2][k] += m * (m * per_denom);
        sample[k] = m + c.rate * (g - m);
        if (param)
            param[k] = NAME(put)(GET(param[k]) * c.decay - c.step_size * (g * per_denom), c.r, at + k);
    }
}

/* BLOCK of them at most, the first of which is element `at` of the tensor. */
static inline void NAME(fact_block)(STORED *param, const STORED *grad, WIDE *sample, const WIDE *denom, int64_t at,
                                    int64_t n, NAME(fact) c, double *sums)
{
    WIDE lanes[SUMS][LANES] = {{0}};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        NAME(fact_reflect)(param ? param + i : NULL, grad + i, sample + i, denom + i, at + i, LANES, c, lanes);
    NAME(fact_reflect)(param ? param + i : NULL, grad + i, sample + i, denom + i, at + i, n - i, c, lanes);
    for (int s = 0; s < SUMS; s++)
        sums[s] += NAME(total)(lanes[s]);
}

/* The sums of reflection of a matrix, from its sample. */
static void NAME(fact_sample)(const bucket *b, int64_t tensor, const WIDE *rows, const WIDE *columns, double *sums)
{
    const int64_t width = b->size[tensor] / b->rows[tensor], samples = b->samples[tensor], stride = b->stride[tensor];
    const STORED *grad = (const STORED *)b->tensors[b->count + tensor];
    const NAME(fact) c = NAME(fact_scalars)(b, tensor);
    WIDE *sample = (WIDE *)b->tensors[4 * b->count + tensor];
    STORED sampled[BLOCK];
    WIDE denom[BLOCK];
    for (int64_t done = 0, r = 0, i = 0; done < samples; done += BLOCK) {
        const int64_t some = samples - done < BLOCK ? samples - done : BLOCK;
        for (int64_t k = 0; k < some; k++) {
            sampled[k] = grad[r * width + i];
            denom[k] = rows[r] * columns[i] + c.eps;
            r += stride / width, i += stride % width;
            if (i >= width)
                r++, i -= width;
        }
        NAME(fact_block)(NULL, sampled, sample + done, denom, 0, some, c, sums);
    }
    for (int s = 0; s < SUMS; s++)
        sums[s] *= (double)b->size[tensor] / (double)samples;
}

/* All of a matrix that is no larger than its sample: the sums of reflection, and the move. */
static void NAME(fact_all)(const bucket *b, int64_t tensor, const WIDE *rows, const WIDE *columns, double *sums)
{
    const int64_t size = b->size[tensor], width = size / b->rows[tensor];
    STORED *param = (STORED *)b->tensors[tensor];
    const STORED *grad = (const STORED *)b->tensors[b->count + tensor];
    const NAME(fact) c = NAME(fact_scalars)(b, tensor);
    WIDE *sample = (WIDE *)b->tensors[4 * b->count + tensor];
    WIDE denom[BLOCK + LANES];
    for (int64_t at = 0; at < size; at += BLOCK) {
        const int64_t some = size - at < BLOCK ? size - at : BLOCK;
        NAME(fact_denoms)(rows + at / width, columns, at % width, some, width, c.eps, denom);
        NAME(fact_block)(param + at, grad + at, sample + at, denom, at, some, c, sums);
    }
}

/* Moves n elements, from one that is element `at` of the tensor on. */
static inline void NAME(fact_step)(STORED *param, const STORED *grad, const WIDE *denom, int64_t at, int64_t n,
                                   NAME(fact) c)
{
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
        const WIDE step = GET(grad[k]) * c.scale / denom[k];
        param[k] = NAME(put)(GET(param[k]) * c.decay - c.step_size * step, c.r, at + k);
    }
}

/* Moves a stretch of each of some rows. */
static inline void NAME(fact_stretch)(STORED *param, const STORED *grad, const WIDE *rows, const WIDE *columns,
                                      const int some, int64_t apart, int64_t width, int64_t at, int64_t n,
                                      NAME(fact) c)
{
    for (int r = 0; r < some; r++) {
        STORED *p = param + r * apart * width;
        const STORED *g = grad + r * apart * width;
        const WIDE factor = rows[r * apart];
        const rounding here = after(c.r, at + r * apart * width);
#pragma omp simd
        for (int64_t k = 0; k < n; k++) {
            const WIDE step = GET(g[k]) * c.scale / (factor * columns[k] + c.eps);
            p[k] = NAME(put)(GET(p[k]) * c.decay - c.step_size * step, here, k);
        }
    }
}

/* Moves some wide rows, ROWS or 1 of them, so many apart. */
static inline void NAME(fact_move_wide)(STORED *param, const STORED *grad, const WIDE *rows, const WIDE *columns,
                                        const int some, int64_t apart, int64_t width, int64_t at, NAME(fact) c)
{
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES)
        NAME(fact_stretch)(param + i, grad + i, rows, columns + i, some, apart, width, at + i, LANES, c);
    NAME(fact_stretch)(param + i, grad + i, rows, columns + i, some, apart, width, at + i, width - i, c);
}

static void NAME(fact_bands)(const bucket *b, int64_t tensor, int64_t start, int64_t n)
{
    const int64_t width = b->size[tensor] / b->rows[tensor], apart = n / ROWS;
    STORED *param = (STORED *)b->tensors[tensor] + start * width;
    const STORED *grad = (const STORED *)b->tensors[b->count + tensor] + start * width;
    const WIDE *rows = NAME(fact_rows)(b, tensor) + start, *columns = rows - start + b->rows[tensor];
    NAME(fact) c = NAME(fact_scalars)(b, tensor);
    c.r = after(c.r, start * width);
    if (width >= 2 * LANES) {
        for (int64_t r = 0, at = 0; r < n; r++, at += width) {
            if (r < apart)
                NAME(fact_move_wide)(param + at, grad + at, rows + r, columns, ROWS, apart, width, at, c);
            else if (r >= ROWS * apart)
                NAME(fact_move_wide)(param + at, grad + at, rows + r, columns, 1, 0, width, at, c);
        }
        return;
    }
    WIDE denom[BLOCK + LANES];
    for (int64_t at = 0; at < n * width; at += BLOCK) {
        const int64_t some = n * width - at < BLOCK ? n * width - at : BLOCK;
        NAME(fact_denoms)(rows + at / width, columns, at % width, some, width, c.eps, denom);
        NAME(fact_step)(param + at, grad + at, denom, at, some, c);
    }
}

/* Bands meet: both memories, and then the sample that reflection takes. */
static void NAME(fact_meet)(const bucket *b, int64_t tensor, int64_t start, int64_t n, double *sums)
{
    const int64_t height = b->rows[tensor], width = b->size[tensor] / height;
    WIDE *rows = NAME(fact_rows)(b, tensor), *columns = rows + height;
    (void)start, (void)n;
    for (int64_t from = 0; from < width; from += BLOCK) {
        const int64_t some = width - from < BLOCK ? width - from : BLOCK;
        double sum[BLOCK];
        for (int64_t k = 0; k < some; k++)
            sum[k] = (double)columns[from + k];
        for (int64_t band = 1; band * BAND < height; band++)
            for (int64_t k = 0; k < some; k++)
                sum[k] += (double)columns[band * width + from + k];
        for (int64_t k = 0; k < some; k++)
            columns[from + k] = (WIDE)(sum[k] / (double)height);
    }
    NAME(remember)(b, (WIDE *)b->tensors[2 * b->count + tensor], rows, height, (WIDE)(1 / b->bias[tensor]));
    NAME(remember)(b, (WIDE *)b->tensors[3 * b->count + tensor], columns, width, 1);
    if (b->reflect && b->stride[tensor] == 1) {
        NAME(fact_all)(b, tensor, rows, columns, sums);
        return;
    }
    if (b->reflect)
        NAME(fact_sample)(b, tensor, rows, columns, sums);
    if (b->size[tensor] <= PIECE) /* while its gradient is in the caches nearest by */
        NAME(fact_bands)(b, tensor, 0, height);
}

static void NAME(fact_move)(const bucket *b, int64_t tensor, int64_t start, int64_t n, double *sums)
{
    (void)sums;
    if (b->size[tensor] > PIECE)
        NAME(fact_bands)(b, tensor, start, n);
}

int NAME(emofact)(const bucket *b)
{
    return sweep((job){.b = b, .body = NAME(fact_meet), .step = 1}) ||
           sweep((job){.b = b, .body = NAME(fact_move), .extent = b->rows, .step = BAND});
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

/* The shadow follows the parameters, as torch's lerp has it; but where that is not finite, as in a mask, it is them --*/

static inline WIDE NAME(finite)(WIDE moved, WIDE weight)
{
    return moved - moved == 0 ? moved : weight;
}

static void NAME(follow_piece)(const bucket *b, int64_t tensor, int64_t start, int64_t n, double *sums)
{
    const STORED *param = (const STORED *)b->tensors[tensor] + start;
    WIDE *shadow = (WIDE *)b->tensors[b->count + tensor] + start;
    const WIDE rate = (WIDE)b->follow, rest = 1 - rate;
    (void)sums;
    if (rate < (WIDE)0.5) {
#pragma omp simd
        for (int64_t k = 0; k < n; k++)
            shadow[k] = NAME(finite)(MULTIPLY_ADD(rate, GET(param[k]) - shadow[k], shadow[k]), GET(param[k]));
    } else {
#pragma omp simd
        for (int64_t k = 0; k < n; k++)
            shadow[k] = NAME(finite)(MULTIPLY_ADD(rest, shadow[k] - GET(param[k]), GET(param[k])), GET(param[k]));
    }
}

int NAME(follow)(const bucket *b)
{
    return sweep_elements(b, NAME(follow_piece));
}

/* Samples, for a rule that nobody knows (displacement.py) ------------------------------------------------------------*/

void NAME(gather_samples)(const sampling *s, const STORED *const *tensors, WIDE *out)
{
    for (int64_t i = 0; i < s->count; i++)
        for (int64_t block = 0; block < s->blocks[i]; block++)
            for (int64_t k = 0; k < s->length[i]; k++)
                *out++ = GET(tensors[i][block * s->apart[i] + k]);
}

/* At most LANES coordinates. The second and the third memory lie behind the first, each `size` after the one before. */
static inline void NAME(compare_some)(const STORED *param, const WIDE *before, const WIDE *grad, WIDE *last, int64_t size,
                                      int64_t n, WIDE per_rate, double rate, WIDE lanes[SUMS][LANES])
{
    WIDE *grad_sq = last + size, *step_sq = last + 2 * size;
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
        const WIDE gg = grad_sq[k], uu = step_sq[k], known = gg > 0 && uu > 0 ? 1 : 0;
        const WIDE g = known > 0 ? grad[k] : 0, u = known > 0 ? last[k] : 0;
        const WIDE metric = ROOT((known > 0 ? gg : 1) / (known > 0 ? uu : 1));
        lanes[0][k] = MULTIPLY_ADD(g, u, lanes[0][k]);
        lanes[1][k] = MULTIPLY_ADD(g, g / metric, lanes[1][k]);
        lanes[2][k] = MULTIPLY_ADD(u, u * metric, lanes[2][k]);
        const WIDE step = (before[k] - GET(param[k])) * per_rate;
        grad_sq[k] = MULTIPLY_ADD((WIDE)rate, grad[k] * grad[k] - gg, gg);
        step_sq[k] = MULTIPLY_ADD((WIDE)rate, step * step - uu, uu);
        last[k] = step;
    }
}

/* Samples of the parameters before a step, and of the gradients it was taken on, lie one after the other. */
void NAME(compare_samples)(const sampling *s, const STORED *const *params, WIDE *const *memories, const WIDE *before,
                           const WIDE *grad, const WIDE *per_rate, double rate, double *sums)
{
    for (int64_t i = 0; i < s->count; i++) {
        const int64_t size = s->blocks[i] * s->length[i], whole = s->length[i] / LANES * LANES;
        WIDE *last = memories[i], lanes[SUMS][LANES] = {{0}};
        for (int64_t block = 0; block < s->blocks[i]; block++) {
            const STORED *param = params[i] + block * s->apart[i];
            int64_t k = 0;
            for (; k < whole; k += LANES)
                NAME(compare_some)(param + k, before + k, grad + k, last + k, size, LANES, per_rate[i], rate, lanes);
            NAME(compare_some)(param + k, before + k, grad + k, last + k, size, s->length[i] - k, per_rate[i], rate, lanes);
            before += s->length[i], grad += s->length[i], last += s->length[i];
        }
        for (int k = 0; k < SUMS; k++)
            sums[s->count * k + i] = NAME(total)(lanes[k]);
    }
}

#undef NAME
#undef STORED
#undef WIDE
#undef GET
#undef PUT
#undef DROPPED
#undef ROOT
#undef ABS
#undef RECIPROCAL
