/* A decoder's operators on a CPU but for its products (cpu_linear.c): norms, rotation, attention, argmax. Everything is
   summed in fp32. Compiled once for the machine by cpu_build.py; cpu.py describes the arguments. */

#include "cpu_split.h"

#define MAX_HEAD 1024 /* widest head of attention and rotation */

/* ---- norms -------------------------------------------------------------------------------------------------- */

INLINE void norm_row(const void *x, const void *residual, const void *weight, const void *bias, void *y, void *sum,
                     float *row, int64_t n, float eps, int center, int half) {
  float mean = 0, square = 0;
  for (int64_t i = 0; i < n; i++) {
    float v = load(x, i, half);
    if (residual) {
      v += load(residual, i, half);
      if (half) v = widen(narrow(v));
      if (sum) store(sum, i, v, half);
    }
    row[i] = v;
  }
  vec total = {0};
  int64_t i;
  if (center) {
    for (i = 0; i + LANES <= n; i += LANES) total += *(vec *)(row + i);
    mean = sum_vec(total);
    for (; i < n; i++) mean += row[i];
    mean /= n;
    for (i = 0; i < n; i++) row[i] -= mean;
    total = (vec){0};
  }
  for (i = 0; i + LANES <= n; i += LANES) total += *(vec *)(row + i) * *(vec *)(row + i);
  square = sum_vec(total);
  for (; i < n; i++) square += row[i] * row[i];
  float scale = 1 / sqrtf(square / n + eps);
  for (i = 0; i < n; i++)
    store(y, i, row[i] * scale * load(weight, i, half) + (bias ? load(bias, i, half) : 0), half);
}

/* center: layer norm; otherwise RMS norm. Where residual or sum is NULL no sum is written. */
void miinb_norm(const void *x, const void *residual, const void *weight, const void *bias, void *y, void *sum,
                int64_t m, int64_t n, float eps, int center, int half) {
  const int64_t bytes = half ? 2 : 4;
#pragma omp parallel if (m > 16)
  {
    float *row = malloc(sizeof(float) * n);
    if (!row) abort();
#pragma omp for
    for (int64_t i = 0; i < m; i++) {
      const int64_t at = i * n * bytes;
      const void *r = residual ? (const char *)residual + at : NULL;
      void *s = residual && sum ? (char *)sum + at : NULL;
      if (half)
        norm_row((const char *)x + at, r, weight, bias, (char *)y + at, s, row, n, eps, center, 1);
      else
        norm_row((const char *)x + at, r, weight, bias, (char *)y + at, s, row, n, eps, center, 0);
    }
    free(row);
  }
}

/* ---- rotary embedding and cache append ---------------------------------------------------------------------- */

typedef struct {
  const void *qkv, *q_norm, *k_norm;
  const float *cos, *sin;
  const int64_t *positions, *slots;
  void *q, *k, *v;
  int64_t tokens, heads, kv_heads, head_size, rotary_dim;
  float eps;
  int interleaved;
} rope_args;

INLINE void rope_head(const rope_args *a, const void *from, void *to, const void *norm, int64_t position, int half) {
  const int64_t size = a->head_size, pairs = a->cos ? a->rotary_dim / 2 : 0;
  float h[MAX_HEAD];
  for (int64_t i = 0; i < size; i++) h[i] = load(from, i, half);
  if (norm) {
    float square = 0;
    for (int64_t i = 0; i < size; i++) square += h[i] * h[i];
    float scale = 1 / sqrtf(square / size + a->eps);
    for (int64_t i = 0; i < size; i++) h[i] *= scale * load(norm, i, half);
  }
  const float *cosine = a->cos + position * pairs, *sine = a->sin + position * pairs;
  const int64_t stride = a->interleaved ? 2 : 1, other = a->interleaved ? 1 : pairs;
  for (int64_t i = 0; i < pairs; i++) {
    float first = h[i * stride], second = h[i * stride + other];
    h[i * stride] = first * cosine[i] - second * sine[i];
    h[i * stride + other] = second * cosine[i] + first * sine[i];
  }
  for (int64_t i = 0; i < size; i++) store(to, i, h[i], half);
}

INLINE void rope_token(const rope_args *a, int64_t t, int half) {
  const int64_t size = a->head_size, bytes = half ? 2 : 4, all = a->heads + 2 * a->kv_heads;
  const char *from = (const char *)a->qkv + t * all * size * bytes;
  char *q = (char *)a->q + t * a->heads * size * bytes;
  char *k = (char *)a->k + a->slots[t] * a->kv_heads * size * bytes;
  char *v = (char *)a->v + a->slots[t] * a->kv_heads * size * bytes;
  for (int64_t h = 0; h < a->heads; h++, from += size * bytes)
    rope_head(a, from, q + h * size * bytes, a->q_norm, a->positions[t], half);
  for (int64_t h = 0; h < a->kv_heads; h++, from += size * bytes)
    rope_head(a, from, k + h * size * bytes, a->k_norm, a->positions[t], half);
  memcpy(v, from, a->kv_heads * size * bytes);
}

void miinb_rope_append(const void *qkv, const int64_t *positions, const float *cos, const float *sin, void *k, void *v,
                       const int64_t *slots, const void *q_norm, const void *k_norm, void *q, int64_t tokens,
                       int64_t heads, int64_t kv_heads, int64_t head_size, int64_t rotary_dim, float eps,
                       int interleaved, int half) {
  rope_args a = {qkv, q_norm, k_norm,   cos,        sin, positions,  slots, q, k, v, tokens, heads, kv_heads,
                 head_size, rotary_dim, eps, interleaved};
#pragma omp parallel for if (tokens > 16)
  for (int64_t t = 0; t < tokens; t++) {
    if (half)
      rope_token(&a, t, 1);
    else
      rope_token(&a, t, 0);
  }
}

/* ---- attention of single queries ---------------------------------------------------------------------------- */

typedef struct {
  const void *q, *k, *v;
  const int32_t *table, *lengths;
  void *out;
  int64_t table_width, page_tokens, heads, kv_heads, head_size, window;
  float scale, softcap;
  const float *alibi;
} attention_args;

/* One head's key or value at a position of a row. */
INLINE const char *entry(const attention_args *a, const void *cache, int64_t row, int64_t kv, int64_t page, int half) {
  int64_t first = (int64_t)a->table[row * a->table_width + page] * a->page_tokens;
  return (const char *)cache + (first * a->kv_heads + kv) * a->head_size * (half ? 2 : 4);
}

INLINE float score_of(const attention_args *a, const float *q, const char *k, int half) {
  const int64_t size = a->head_size;
  vec sums = {0}, more = {0};
  int64_t i = 0;
  for (; i + BLOCK <= size; i += BLOCK) {
    sums += (half ? even((const bf16 *)k + i) : *(const vec *)((const float *)k + i)) * *(const vec *)(q + i);
    more += (half ? odd((const bf16 *)k + i) : *(const vec *)((const float *)k + i + LANES)) * *(const vec *)(q + i + LANES);
  }
  float score = sum_vec(sums + more);
  for (; i < size; i++) score += load(k, i, half) * q[i];
  return a->softcap > 0 ? a->softcap * tanhf(score / a->softcap) : score;
}

/* out += weights[p] * value of p, for `count` positions whose values are `stride` bytes apart. The sums of a few blocks
   of the head stay in registers while the positions go by. */
INLINE void add_block(float *out, const char *v, int64_t stride, const float *weights, int64_t count, int64_t i,
                      int blocks, int half) {
  vec sums[2 * 4];
  for (int b = 0; b < 2 * blocks; b++) sums[b] = *(vec *)(out + i + b * LANES);
  for (int64_t p = 0; p < count; p++, v += stride)
    for (int b = 0; b < blocks; b++) {
      const int64_t at = i + b * BLOCK;
      vec first = half ? even((const bf16 *)v + at) : *(const vec *)((const float *)v + at);
      vec second = half ? odd((const bf16 *)v + at) : *(const vec *)((const float *)v + at + LANES);
      sums[2 * b] += first * weights[p];
      sums[2 * b + 1] += second * weights[p];
    }
  for (int b = 0; b < 2 * blocks; b++) *(vec *)(out + i + b * LANES) = sums[b];
}

INLINE void add_values(const attention_args *a, float *out, const char *v, int64_t stride, const float *weights,
                       int64_t count, int half) {
  const int64_t size = a->head_size;
  int64_t i = 0;
  for (; i + 4 * BLOCK <= size; i += 4 * BLOCK) add_block(out, v, stride, weights, count, i, 4, half);
  for (; i + BLOCK <= size; i += BLOCK) add_block(out, v, stride, weights, count, i, 1, half);
  for (; i < size; i++)
    for (int64_t p = 0; p < count; p++) out[i] += load(v + p * stride, i, half) * weights[p];
}

/* Head h of the one query of a row, over its context. scores: room for the context's length. */
INLINE void attend(const attention_args *a, int64_t row, int64_t h, float *scores, int half) {
  const int64_t size = a->head_size, length = a->lengths[row], kv = h / (a->heads / a->kv_heads);
  const int64_t stride = a->kv_heads * size * (half ? 2 : 4), tokens = a->page_tokens;
  const int64_t first = a->window && length > a->window ? length - a->window : 0;
  const int64_t at = (row * a->heads + h) * size;
  float plain[MAX_HEAD], q[MAX_HEAD], best = -INFINITY, mass = 0;
  for (int64_t i = 0; i < size; i++) plain[i] = load(a->q, at + i, half) * a->scale;
  if (half)
    split(plain, q, size);
  else
    memcpy(q, plain, sizeof(float) * size);
  for (int64_t p = first; p < length;) {
    int64_t end = (p / tokens + 1) * tokens < length ? (p / tokens + 1) * tokens : length;
    const char *k = entry(a, a->k, row, kv, p / tokens, half) + p % tokens * stride;
    for (; p < end; p++, k += stride) scores[p] = score_of(a, q, k, half);
  }
  if (a->alibi)
    for (int64_t p = first; p < length; p++) scores[p] += a->alibi[h] * (float)(p - (length - 1));
  for (int64_t p = first; p < length; p++) best = scores[p] > best || scores[p] != scores[p] ? scores[p] : best;
  for (int64_t p = first; p < length; p++) scores[p] = exp_fast(scores[p] - best);
  for (int64_t p = first; p < length; p++) mass += scores[p];
  float out[MAX_HEAD];
  memset(out, 0, sizeof(float) * size);
  for (int64_t p = first; p < length;) {
    int64_t end = (p / tokens + 1) * tokens < length ? (p / tokens + 1) * tokens : length;
    const char *v = entry(a, a->v, row, kv, p / tokens, half) + p % tokens * stride;
    add_values(a, out, v, stride, scores + p, end - p, half);
    p = end;
  }
  for (int64_t i = 0; i < size; i++) {
    int64_t in = i % BLOCK, from = half && i - in + BLOCK <= size ? i - in + in / 2 + in % 2 * LANES : i;
    store(a->out, at + i, out[from] / mass, half);
  }
}

void miinb_attention(const void *q, const void *k, const void *v, const int32_t *table, const int32_t *lengths,
                     void *out, int64_t rows, int64_t table_width, int64_t page_tokens, int64_t heads,
                     int64_t kv_heads, int64_t head_size, int64_t window, float scale, float softcap,
                     const float *alibi, int half) {
  attention_args a = {q,     k,        v,         table,  lengths, out,     table_width, page_tokens,
                      heads, kv_heads, head_size, window, scale,   softcap, alibi};
#pragma omp parallel
  {
    float *scores = malloc(sizeof(float) * table_width * page_tokens);
    if (!scores) abort();
#pragma omp for
    for (int64_t i = 0; i < rows * heads; i++) {
      if (half)
        attend(&a, i / heads, i % heads, scores, 1);
      else
        attend(&a, i / heads, i % heads, scores, 0);
    }
    free(scores);
  }
}

/* ---- argmax ------------------------------------------------------------------------------------------------- */

INLINE void argmax_row(const void *x, int64_t n, int64_t *id, uint8_t *finite, int half) {
  float best = -INFINITY, poison = 0;
  for (int64_t i = 0; i < n; i++) {
    float v = load(x, i, half);
    poison += v * 0; /* NaN as soon as one value is NaN or infinite */
    best = v > best ? v : best;
  }
  *id = 0;
  *finite = isfinite(best) && poison == poison;
  for (int64_t i = 0; i < n; i++)
    if (load(x, i, half) == best) {
      *id = i;
      break;
    }
}

/* The first of the largest of each row of x [m, n], and whether the row is finite. */
void miinb_argmax(const void *x, int64_t *ids, uint8_t *finite, int64_t m, int64_t n, int half) {
#pragma omp parallel for if (m > 1)
  for (int64_t i = 0; i < m; i++) {
    if (half)
      argmax_row((const bf16 *)x + i * n, n, ids + i, finite + i, 1);
    else
      argmax_row((const float *)x + i * n, n, ids + i, finite + i, 0);
  }
}
