/* The products of a decoder on a CPU: bound by memory where a step has few rows, so weights are read once, in the form
   that they have there. Everything is summed in fp32. */

#include "cpu_weights.h"

/* ---- linear ------------------------------------------------------------------------------------------------- */

/* Every output is summed over the columns in the same order, whatever the number of rows and the tile that it falls
   in: its bits do not depend on what else is in the step. */
#if LANES == 16
#define FEW 8 /* rows of x up to which weights are widened on the way; for more, rows of weights are widened once */
#else
#define FEW 4
#endif
#define NB 8    /* rows of weights in a tile at most: a tile's sums have to stay in registers */
#define PANEL 4 /* so many at a time, for two rows of x: with more than eight sums GCC does not keep them in registers */

/* Rows of x up to which weights are read as they are; in fp32 there is nothing to widen. */
INLINE int few_of(int kind) { return kind == FP32 ? 4 : FEW; }

/* Rows of weights in a tile with so many rows of x, an even number: what was fastest. With AVX2 (16 registers) int4 has
   three registers of levels for each, and int8 was faster with fewer streams. */
INLINE int height_of(int64_t m, int kind) {
  if (kind == INT4 && LANES == 8) return 2;
  if (m == 1) return grouped(kind) ? 4 : 8;
  if (LANES == 16) return m <= 4 ? 4 : 2;
  return m == 2 ? 4 : 2;
}

typedef struct {
  const void *w, *bias, *residual;
  const uint32_t *scale; /* [rows of w][groups]: what factor_of takes */
  void *y;
  int64_t n, k; /* outputs, columns */
  int activation, gated;
} linear_args;

/* A row of weights as fp32, in the order of weights_of. */
INLINE void widen_row(const linear_args *a, const void *from, const uint32_t *scale, float *to, int kind) {
  if (kind == BF16) widen_split((const bf16 *)from, to, a->k);
  for (int64_t i = 0, end; grouped(kind) && i < a->k; scale++) {
    const factor f = factor_of(*scale, kind);
    end = a->k - i < GROUP ? a->k : i + GROUP;
    for (; kind == INT8 && i < end; i++) to[i] = ((const int8_t *)from)[i] * f.scale;
    for (; kind == INT4 && i < end; i += PART)
      for (int side = 0; side < SIDES; side++) *(vec *)(to + i + side * LANES) = weights_of(from, i, side, f, kind);
  }
}

/* sums[m][n] += products of mb rows of x with nb rows of weights, over the steps of the columns [i, end). */
INLINE void multiply(const float *x, int64_t k, const void *const *w, const factor *factors, int64_t i, int64_t end,
                     int mb, int nb, int kind, int ahead, reg sums[FEW][NB]) {
  const int step = step_of(kind);
  for (; i < end; i += step) {
    for (int n = 0; ahead && n < nb; n++) __builtin_prefetch((const char *)w[n] + bytes_of(nb * k + i, kind));
    for (int side = 0; side < step / LANES; side++) {
      reg values[FEW];
      for (int m = 0; m < mb; m++) {
        values[m] = *(const vec *)(x + m * k + i + side * LANES);
        KEEP(values[m]);
      }
      for (int n = 0; n < nb; n++) {
        reg weights = weights_of(w[n], i, side, factors[n], kind);
        for (int m = 0; m < mb; m++) sums[m][n] += weights * values[m];
      }
    }
  }
}

/* out[m][n]: products of mb rows of x (split if the weights were bf16 or int4) with nb rows of weights. */
INLINE void tile(const linear_args *a, const float *x, const void *const *w, const uint32_t *const *scale, int mb,
                 int nb, int kind, int ahead, float out[FEW][NB]) {
  const int64_t k = a->k, blocks = k / step_of(kind) * step_of(kind);
  reg sums[FEW][NB];
  factor factors[NB];
  for (int m = 0; m < mb; m++)
    for (int n = 0; n < nb; n++) sums[m][n] = (reg){0};
  if (!grouped(kind)) multiply(x, k, w, factors, 0, blocks, mb, nb, kind, ahead, sums);
  for (int64_t i = 0, g = 0; grouped(kind) && i < blocks; i += GROUP, g++) {
    for (int n = 0; n < nb; n++) factors[n] = factor_of(scale[n][g], kind);
    /* The rows of a tile are short streams that the hardware's prefetcher loses: ask for the next tile's. */
    for (int n = 0; ahead && n < nb; n++) __builtin_prefetch((const char *)w[n] + bytes_of(nb * k + i, kind));
    multiply(x, k, w, factors, i, i + GROUP < blocks ? i + GROUP : blocks, mb, nb, kind, 0, sums);
  }
  for (int m = 0; m < mb; m++)
    for (int n = 0; n < nb; n++) {
      float s = sum_vec(sums[m][n]);
      const factor last = factor_of(kind == INT8 && blocks < k ? scale[n][blocks / GROUP] : 0, kind);
      /* Said outright: where GCC makes vectors of this loop, it would round the products before it adds them. */
      for (int64_t j = blocks; j < k; j++) s = fmaf(x[m * k + j], weight(w[n], j, last, kind), s);
      out[m][n] = s;
    }
}

INLINE float bias_of(const linear_args *a, int64_t n, int half) { return a->bias ? load(a->bias, n, half) : 0; }

/* The rows of weights of a tile. Gated outputs n need the rows n and n + a->n, which stand next to each other in it. */
INLINE void rows_of(const linear_args *a, int64_t n, int64_t end, int nb, int kind, int64_t *row, const void **w,
                    const uint32_t **scale) {
  for (int j = 0; j < nb; j++) {
    int64_t at = n + (a->gated ? j / 2 : j);
    if (at >= end) at = end - 1;
    row[j] = a->gated && j % 2 ? at + a->n : at;
    w[j] = (const char *)a->w + bytes_of(row[j] * a->k, kind);
    scale[j] = grouped(kind) ? a->scale + row[j] * ((a->k + GROUP - 1) / GROUP) : NULL;
  }
}

/* Called, not inlined: with its activations in every tile the library takes twice as long to compile. */
static __attribute__((noinline)) void store_tile(const linear_args *a, float out[FEW][NB], const int64_t *row, int64_t m,
                                                 int count, int64_t n, int64_t end, int nb, int half) {
  for (int r = 0; r < count; r++)
    for (int j = 0; j < (a->gated ? nb / 2 : nb) && n + j < end; j++) {
      int64_t at = (m + r) * a->n + n + j;
      float value;
      if (a->gated) {
        float gate = out[r][2 * j] + bias_of(a, row[2 * j], half);
        value = activate(gate, a->activation) * (out[r][2 * j + 1] + bias_of(a, row[2 * j + 1], half));
      } else {
        value = activate(out[r][j] + bias_of(a, n + j, half), a->activation);
      }
      if (a->residual) value += load(a->residual, at, half);
      store(a->y, at, value, half);
    }
}

/* All of few rows of x: the weights are read once. */
INLINE void few_rows(const linear_args *a, const float *x, int mb, int nb, int kind, int half) {
  int64_t start, stop, step = a->gated ? nb / 2 : nb, row[NB];
  const void *w[NB];
  const uint32_t *scale[NB];
  float out[FEW][NB];
  part(a->n, step, &start, &stop);
  for (int64_t n = start; n < stop; n += step) {
    rows_of(a, n, stop, nb, kind, row, w, scale);
    tile(a, x, w, scale, mb, nb, kind, 1, out);
    store_tile(a, out, row, 0, mb, n, stop, nb, half);
  }
}

/* Many rows of x: rows of weights are widened once for as many rows of x as the L2 cache holds. */
INLINE void many_rows(const linear_args *a, const float *x, int64_t rows, int kind, int half) {
  const int64_t k = a->k, chunk = (256 << 10) / (4 * k) > 12 ? (256 << 10) / (4 * k) / 2 * 2 : 12;
  int64_t start, stop, step = a->gated ? PANEL / 2 : PANEL, row[PANEL];
  const void *w[PANEL];
  const uint32_t *scale[PANEL];
  float out[FEW][NB], *panel = NULL;
  if (kind != FP32 && posix_memalign((void **)&panel, 64, sizeof(float) * PANEL * k)) abort();
  part(a->n, step, &start, &stop);
  for (int64_t from = 0; from < rows; from += chunk)
    for (int64_t n = start; n < stop; n += step) {
      rows_of(a, n, stop, PANEL, kind, row, w, scale);
      for (int j = 0; kind != FP32 && j < PANEL; j++) {
        widen_row(a, w[j], scale[j], panel + j * k, kind);
        w[j] = panel + j * k;
      }
      for (int64_t m = from, end = from + chunk < rows ? from + chunk : rows; m < end; m += 2) {
        const int count = end - m < 2 ? 1 : 2;
        if (count == 1) tile(a, x + m * k, w, scale, 1, PANEL, FP32, 0, out);
        if (count == 2) tile(a, x + m * k, w, scale, 2, PANEL, FP32, 0, out);
        store_tile(a, out, row, m, count, n, stop, PANEL, half);
      }
    }
  free(panel);
}

/* ---- linear, of a block of rows ------------------------------------------------------------------------------- */

/* Of many rows of x a tile's sums are best held in registers while a column of x and a column of weights are multiplied
   with each other (Goto and van de Geijn, https://doi.org/10.1145/1356052.1356053). So that the sums are those of `tile`
   to the bit, the columns go by in its order: first those of lane 0, then those of lane 1, and so on, and the lanes' sums
   are added as `sum_vec` does. For that x and the weights are packed lane by lane. */
#if defined(__AVX512F__)
#define MR 12 /* rows of x in a tile: 2 * MR sums, two vectors of weights and one number of x have to be in registers */
#else
#define MR 6
#endif
#define NR (2 * LANES) /* rows of weights in a tile */
#define MANY 16        /* rows of x from which packing is worth its time */
#define CHUNK 192      /* rows of x for which weights are packed once, a multiple of MR */

#if LANES == 16
typedef int32_t places __attribute__((vector_size(64)));
#define LOW (places){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}
#define HIGH (places){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}
#else
typedef int32_t places __attribute__((vector_size(32)));
#define LOW (places){0, 8, 1, 9, 2, 10, 3, 11}
#define HIGH (places){4, 12, 5, 13, 6, 14, 7, 15}
#endif

INLINE void transpose(reg rows[LANES]) {
  for (int round = 1; round < LANES; round *= 2) {
    reg from[LANES];
    for (int i = 0; i < LANES; i++) from[i] = rows[i];
    for (int i = 0; i < LANES / 2; i++) {
      rows[2 * i] = __builtin_shuffle(from[i], from[i + LANES / 2], LOW);
      rows[2 * i + 1] = __builtin_shuffle(from[i], from[i + LANES / 2], HIGH);
    }
  }
}

/* Rows [m, m + MR) of x as [lane][column of the lane][MR], rows that are not there as zeros. */
INLINE void pack_x(const void *x, float *to, int64_t m, int64_t rows, int64_t k, int kind, int half) {
  const int paired = kind == BF16 || kind == INT4; /* see `weights_of` */
  const int64_t steps = k / LANES;
  for (int64_t r = 0; r < MR; r++)
    for (int64_t t = 0; t < steps; t++) {
      const int64_t from = (m + r) * k + t / 2 * BLOCK + t % 2 * (paired ? 1 : LANES);
      for (int64_t l = 0; l < LANES; l++)
        to[(l * steps + t) * MR + r] = m + r < rows ? load(x, from + l * (paired ? 2 : 1), half) : 0;
    }
}

/* A tile's rows of weights as [lane][column of the lane][NR]. */
INLINE void pack_weights(const linear_args *a, const void *const *w, const uint32_t *const *scale, float *to, int kind) {
  const int64_t steps = a->k / LANES;
  const int sides = step_of(kind) / LANES;
  for (int first = 0; first < NR; first += LANES)
    for (int64_t t = 0; t < steps; t += sides) {
      const int64_t i = t * LANES;
      factor factors[LANES];
      for (int n = 0; n < LANES; n++)
        factors[n] = factor_of(grouped(kind) ? scale[first + n][i / GROUP] : 0, kind);
      for (int side = 0; side < sides; side++) {
        reg rows[LANES];
        for (int n = 0; n < LANES; n++) rows[n] = weights_of(w[first + n], i, side, factors[n], kind);
        transpose(rows);
        for (int l = 0; l < LANES; l++) *(vec *)(to + (l * steps + t + side) * NR + first) = rows[l];
      }
    }
}

/* One lane's sums of a tile. */
INLINE void outer(const float *x, const float *w, int64_t steps, reg out[MR][2]) {
  reg sums[MR][2] = {{{0}}};
  for (int64_t t = 0; t < steps; t++, x += MR, w += NR) {
    reg first = *(const vec *)w, second = *(const vec *)(w + LANES);
    for (int r = 0; r < MR; r++) {
      sums[r][0] += first * x[r];
      sums[r][1] += second * x[r];
    }
  }
  memcpy(out, sums, sizeof sums);
}

INLINE void activate_all(float *values, int64_t n, int kind) {
  for (int64_t j = 0; j < n; j++) values[j] = activate(values[j], kind);
}

/* Bias, activation and residual of a row's sums: as in `store_tile`, but of all outputs of a tile at a time. */
INLINE void finish_row(const linear_args *a, const float *sums, int64_t m, int64_t n, int64_t end, int half) {
  const int64_t step = a->gated ? LANES : NR, count = end - n < step ? end - n : step;
  float values[NR], gated[LANES];
  for (int64_t j = 0; j < step; j++) values[j] = sums[j] + (j < count ? bias_of(a, n + j, half) : 0);
  for (int64_t j = 0; a->gated && j < step; j++)
    gated[j] = sums[LANES + j] + (j < count ? bias_of(a, a->n + n + j, half) : 0);
  switch (a->activation) {
    case RELU: activate_all(values, step, RELU); break;
    case SILU: activate_all(values, step, SILU); break;
    case GELU: activate_all(values, step, GELU); break;
    case GELU_TANH: activate_all(values, step, GELU_TANH); break;
  }
  for (int64_t j = 0; a->gated && j < step; j++) values[j] *= gated[j];
  for (int64_t j = 0; a->residual && j < count; j++) values[j] += load(a->residual, m * a->n + n + j, half);
  for (int64_t j = 0; j < count; j++) store(a->y, m * a->n + n + j, values[j], half);
}

/* Rows [m, end) of the outputs of one tile of weights. x, w: packed. */
static __attribute__((noinline)) void block(const linear_args *a, const float *x, const float *w, int64_t m, int64_t end,
                                            int64_t n, int half) {
  const int64_t steps = a->k / LANES;
  for (; m < end; m += MR) {
    reg lanes[LANES][MR][2];
    for (int l = 0; l < LANES; l++) outer(x + m * a->k + l * steps * MR, w + l * steps * NR, steps, lanes[l]);
    for (int r = 0; r < MR && m + r < end; r++) {
      reg sums[2];
      for (int side = 0; side < 2; side++) {
        reg quarter[4];
        for (int j = 0; j < 4; j++) quarter[j] = lanes[j][r][side];
        for (int l = 4; l < LANES; l++) quarter[l % 4] += lanes[l][r][side];
        sums[side] = (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
      }
      finish_row(a, (const float *)sums, m + r, n, a->n, half);
    }
  }
}

/* All of many rows of x, in a parallel region. packed: room for whole tiles of x. */
INLINE void block_rows(const linear_args *a, const void *x, float *packed, int64_t rows, int kind, int half) {
  const int64_t k = a->k, step = a->gated ? LANES : NR, tiles = (a->n + step - 1) / step, threads = omp_get_num_threads();
  int64_t chunks = (rows + CHUNK - 1) / CHUNK, row[NR];
  if (tiles * chunks < threads) chunks = (threads + tiles - 1) / tiles;
  const int64_t chunk = ((rows + chunks - 1) / chunks + MR - 1) / MR * MR;
  const void *w[NR];
  const uint32_t *scale[NR];
  float *panel;
  if (posix_memalign((void **)&panel, 64, sizeof(float) * NR * k)) abort();
#pragma omp for
  for (int64_t m = 0; m < rows; m += MR) pack_x(x, packed + m * k, m, rows, k, kind, half);
#pragma omp for
  for (int64_t i = 0; i < tiles * chunks; i++) {
    const int64_t n = i / chunks * step, m = i % chunks * chunk, end = m + chunk < rows ? m + chunk : rows;
    for (int64_t j = 0; j < NR; j++) {
      const int64_t at = n + j % step < a->n ? n + j % step : a->n - 1;
      row[j] = j < step ? at : at + a->n;
      w[j] = (const char *)a->w + bytes_of(row[j] * k, kind);
      scale[j] = grouped(kind) ? a->scale + row[j] * ((k + GROUP - 1) / GROUP) : NULL;
    }
    if (m < end) pack_weights(a, w, scale, panel, kind);
    block(a, packed, panel, m, end, n, half);
  }
  free(panel);
}

/* ---- linear, of any rows -------------------------------------------------------------------------------------- */

#define ROWS(M) \
  case M: few_rows(a, x, M, height_of(M, kind), kind, half); break;

INLINE void linear_rows(const linear_args *a, const float *x, int64_t m, int kind, int half) {
  switch (m <= few_of(kind) ? m : 0) {
    ROWS(1) ROWS(2) ROWS(3) ROWS(4)
#if FEW == 8
    ROWS(5) ROWS(6) ROWS(7) ROWS(8)
#endif
    default: many_rows(a, x, m, kind, half);
  }
}

/* Rows of x as `tile` wants them: in fp32, and split for the kinds whose weights are. */
INLINE void order_row(const void *x, float *to, int64_t k, int kind) {
  if (kind == BF16) widen_split((const bf16 *)x, to, k);
  if (kind == INT4) split((const float *)x, to, k);
}

/* kind: of the weights, whose numbers' type x has; fp32 where there is a scale. Of int4 k is a multiple of PART. */
void miinb_linear(const void *x, const void *w, const void *scale, const void *bias, const void *residual, void *y,
                  int64_t m, int64_t n, int64_t k, int activation, int gated, int kind) {
  const linear_args a = {w, bias, residual, scale, y, n, k, activation, gated};
  const int blocks = m >= MANY && k % BLOCK == 0; /* what is left of a row, `tile` adds one by one */
  const int ordered = !blocks && (kind == BF16 || kind == INT4);
  const int64_t room = blocks ? (m + MR - 1) / MR * MR * k : ordered ? m * k : 0, bytes = kind == BF16 ? 2 : 4;
  float *wide = NULL;
  if (room && posix_memalign((void **)&wide, 64, sizeof(float) * room)) abort();
  for (int64_t i = 0; ordered && m <= FEW && i < m; i++)
    order_row((const char *)x + i * k * bytes, wide + i * k, k, kind);
#pragma omp parallel
  {
    if (ordered && m > FEW) {
#pragma omp for
      for (int64_t i = 0; i < m; i++) order_row((const char *)x + i * k * bytes, wide + i * k, k, kind);
    }
    /* Chosen in here: what is passed into a parallel region is no constant for the compiler. */
    if (blocks) switch (kind) {
        case INT4: block_rows(&a, x, wide, m, INT4, 0); break;
        case INT8: block_rows(&a, x, wide, m, INT8, 0); break;
        case BF16: block_rows(&a, x, wide, m, BF16, 1); break;
        default: block_rows(&a, x, wide, m, FP32, 0);
      }
    else switch (kind) {
        case INT4: linear_rows(&a, wide, m, INT4, 0); break;
        case INT8: linear_rows(&a, x, m, INT8, 0); break;
        case BF16: linear_rows(&a, wide, m, BF16, 1); break;
        default: linear_rows(&a, x, m, FP32, 0);
      }
  }
  free(wide);
}
