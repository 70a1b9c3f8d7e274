/* Attention of one query row per sequence over paged keys and values, with grouped query heads.
 *
 * Semantics: for each sequence b and query head h (key-value head g = h / (heads / kv heads)), for the
 * positions j from max(0, len - window) to len - 1, at the token slot
 * page_table[b, j / page_size] * page_size + j % page_size:
 *   s[j] = scale * dot(q[b, h], k[slot, g]);  softcap != 0: s[j] = softcap * tanh(s[j] / softcap)
 *   out[b, h] = sum_j exp(s[j]) v[slot, g] / (sum_j exp(s[j]) + exp(sinks[h]))
 * A sequence without keys gives zeros. Positions are cut into splits of SPLIT keys at absolute
 * positions; each is a softmax of its own, and the splits of a sequence are merged in order. So a result
 * depends on its own sequence alone. Keys and values are read once for all query heads that share them.
 */
#include <math.h>
#include <stdlib.h>

#include "calls.h"
#include "tasks.h"
#include "vector.h"

enum { SPLIT = 256, KEYS = 4, HEADS = 3, AHEAD = 8, COST_TO_THREAD = 150000 };
enum { NO_MEMORY = 1, BAD_LENGTH, BAD_PAGE };

typedef struct {
  int32_t sequence, start, stop; /* positions */
} split_t;

typedef struct {
  void *out;
  const void *q, *k, *v;
  const float *sinks; /* may be NULL */
  const int32_t *page_table;
  split_t *splits;
  int32_t *first_split; /* [num_sequences + 1] */
  float *partials;      /* per split and head: maximum, sum, then padded_dv values */
  float *scratch;       /* per worker, see worker_size */
  int64_t q_strides[2], k_strides[2], v_strides[2], page_stride;
  int64_t num_heads, num_kv_heads, d, dv, padded_d, padded_dv, page_size, worker_size;
  int64_t num_head_parts; /* tasks that share one split */
  float scale, softcap;
  int is_half;
} job_t;

static int64_t padded(int64_t length) { return (length + LANES - 1) / LANES * LANES; }

/* The row as whole float vectors: in place where it already is, else copied and filled with zeros. */
INLINE const float *as_floats(const void *row, int64_t length, int64_t padded_length, float *copy,
                              int is_half) {
  if (!is_half && length == padded_length) return row;
  int64_t i = 0;
  for (; i + LANES <= length; i += LANES) *(vf_any *)(copy + i) = loadv(row, i, is_half);
  for (; i < length; i++) copy[i] = load1(row, i, is_half);
  for (; i < padded_length; i++) copy[i] = 0.0f;
  return copy;
}

/* Heads of one group are taken HEADS at a time, so that a key or value is loaded once for all of them; the
 * sums of HEADS heads by KEYS keys are what 16 vector registers hold. `heads` is a constant where inlined. */
INLINE void score_block(const float *q, const float *const *keys, int heads, int64_t padded_d,
                        float *scores) {
  vf sums[HEADS][KEYS];
  for (int h = 0; h < heads; h++)
    for (int n = 0; n < KEYS; n++) sums[h][n] = splat(0.0f);
  for (int64_t i = 0; i < padded_d; i += LANES) {
    vf query[HEADS];
    for (int h = 0; h < heads; h++) query[h] = *(const vf_any *)(q + h * padded_d + i);
    for (int n = 0; n < KEYS; n++) {
      vf key = *(const vf_any *)(keys[n] + i);
      for (int h = 0; h < heads; h++) sums[h][n] = fmav(query[h], key, sums[h][n]);
    }
  }
  for (int h = 0; h < heads; h++) sum_four(sums[h], scores + h * SPLIT);
}

/* scores[g][n] = dot(q[g], keys[n]) for each head of the group. */
INLINE void score_keys(const float *q, const float *const *keys, int64_t group, int64_t padded_d,
                       float *scores) {
  int64_t g = 0;
  for (; g + HEADS <= group; g += HEADS)
    score_block(q + g * padded_d, keys, HEADS, padded_d, scores + g * SPLIT);
  if (group - g == 2) score_block(q + g * padded_d, keys, 2, padded_d, scores + g * SPLIT);
  if (group - g == 1) score_block(q + g * padded_d, keys, 1, padded_d, scores + g * SPLIT);
}

INLINE void value_block(float *acc, int64_t acc_stride, const float *const *values, int heads,
                        int64_t padded_dv, const float *weights) {
  vf splats[HEADS][KEYS];
  for (int h = 0; h < heads; h++)
    for (int n = 0; n < KEYS; n++) splats[h][n] = splat(weights[h * SPLIT + n]);
  for (int64_t i = 0; i < padded_dv; i += LANES) {
    vf sums[HEADS];
    for (int h = 0; h < heads; h++) sums[h] = *(const vf_any *)(acc + h * acc_stride + i);
    for (int n = 0; n < KEYS; n++) {
      vf value = *(const vf_any *)(values[n] + i);
      for (int h = 0; h < heads; h++) sums[h] = fmav(splats[h][n], value, sums[h]);
    }
    for (int h = 0; h < heads; h++) *(vf_any *)(acc + h * acc_stride + i) = sums[h];
  }
}

/* acc[g] += sum over n, in order, of weights[g][n] * values[n]. */
INLINE void add_values(float *acc, int64_t acc_stride, const float *const *values, int64_t group,
                       int64_t padded_dv, const float *weights) {
  int64_t g = 0;
  for (; g + HEADS <= group; g += HEADS)
    value_block(acc + g * acc_stride, acc_stride, values, HEADS, padded_dv, weights + g * SPLIT);
  if (group - g == 2)
    value_block(acc + g * acc_stride, acc_stride, values, 2, padded_dv, weights + g * SPLIT);
  if (group - g == 1)
    value_block(acc + g * acc_stride, acc_stride, values, 1, padded_dv, weights + g * SPLIT);
}

/* Turn num scores into exp(score - maximum) in place, with zeros up to the next whole vector. */
static void softmax(const job_t *job, float *scores, int64_t num, float *maximum, float *sum) {
  int64_t whole = padded(num);
  for (int64_t n = num; n < whole; n++) scores[n] = 0.0f;
  for (int64_t n = 0; n < whole; n += LANES) {
    vf s = *(vf_any *)(scores + n) * job->scale;
    if (job->softcap != 0.0f) s = tanh_lanes(s / job->softcap) * job->softcap;
    *(vf_any *)(scores + n) = s;
  }
  for (int64_t n = num; n < whole; n++) scores[n] = -INFINITY;
  vf best = *(vf_any *)scores;
  for (int64_t n = LANES; n < whole; n += LANES) {
    vf s = *(vf_any *)(scores + n);
    best = choose(s > best, s, best);
  }
  *maximum = max_lanes(best);
  vf total = splat(0.0f);
  for (int64_t n = 0; n < whole; n += LANES) {
    vf e = exp_lanes(*(vf_any *)(scores + n) - splat(*maximum));
    *(vf_any *)(scores + n) = e;
    total += e;
  }
  *sum = sum_lanes(total);
}

/* rows[c] = key or value n + c of one head as floats, and a hint for those AHEAD positions on. Past the
 * last key the last one is repeated: softmax gives it the weight 0 there. */
INLINE void take_rows(const float **rows, const void *cache, const int64_t *strides, const int64_t *slots,
                      int64_t n, int64_t num, int64_t kv, int64_t length, int64_t padded_length,
                      float *copies, int is_half) {
  for (int c = 0; c < KEYS; c++) {
    int64_t position = n + c < num ? n + c : num - 1;
    const void *row = at(cache, slots[position] * strides[0] + kv * strides[1], is_half);
    rows[c] = as_floats(row, length, padded_length, copies + c * padded_length, is_half);
    if (n + c + AHEAD < num) {
      const char *next = at(cache, slots[n + c + AHEAD] * strides[0] + kv * strides[1], is_half);
      for (int64_t byte = 0; byte < length * (int64_t)element_size(is_half); byte += 64)
        __builtin_prefetch(next + byte);
    }
  }
}

INLINE void attend_typed(const job_t *job, const split_t *split, float *partial, float *scratch,
                         int64_t first_kv, int64_t last_kv, int is_half) {
  const int64_t group = job->num_heads / job->num_kv_heads, width = job->padded_dv + 2;
  const int64_t first_head = first_kv * group, num_heads = (last_kv - first_kv) * group;
  const int64_t num = split->stop - split->start;
  float *q = scratch;
  float *scores = q + num_heads * job->padded_d;
  float *copies = scores + num_heads * SPLIT;
  int64_t slots[SPLIT];
  const int32_t *pages = job->page_table + split->sequence * job->page_stride;
  for (int64_t n = 0; n < num; n++) {
    int64_t position = split->start + n;
    slots[n] = pages[position / job->page_size] * job->page_size + position % job->page_size;
  }
  for (int64_t h = 0; h < num_heads; h++) {
    const void *row =
        at(job->q, split->sequence * job->q_strides[0] + (first_head + h) * job->q_strides[1], is_half);
    float *copy = q + h * job->padded_d;
    const float *floats = as_floats(row, job->d, job->padded_d, copy, is_half);
    if (floats != copy) memcpy(copy, floats, (size_t)job->d * sizeof(float));
  }
  const float *rows[KEYS];
  for (int64_t n = 0; n < num; n += KEYS)
    for (int64_t kv = first_kv; kv < last_kv; kv++) {
      take_rows(rows, job->k, job->k_strides, slots, n, num, kv, job->d, job->padded_d, copies, is_half);
      int64_t head = (kv - first_kv) * group;
      score_keys(q + head * job->padded_d, rows, group, job->padded_d, scores + head * SPLIT + n);
    }
  for (int64_t h = 0; h < num_heads; h++) {
    float *state = partial + h * width;
    softmax(job, scores + h * SPLIT, num, &state[0], &state[1]);
    memset(state + 2, 0, (size_t)job->padded_dv * sizeof(float));
  }
  for (int64_t n = 0; n < num; n += KEYS)
    for (int64_t kv = first_kv; kv < last_kv; kv++) {
      take_rows(rows, job->v, job->v_strides, slots, n, num, kv, job->dv, job->padded_dv, copies, is_half);
      int64_t head = (kv - first_kv) * group;
      add_values(partial + head * width + 2, width, rows, group, job->padded_dv,
                 scores + head * SPLIT + n);
    }
}

static void attend_task(void *opaque, int64_t id, int64_t worker) {
  job_t *job = opaque;
  int64_t split = id / job->num_head_parts, part = id % job->num_head_parts;
  int64_t first_kv = part * job->num_kv_heads / job->num_head_parts;
  int64_t last_kv = (part + 1) * job->num_kv_heads / job->num_head_parts;
  int64_t first_head = first_kv * (job->num_heads / job->num_kv_heads);
  float *partial = job->partials + (split * job->num_heads + first_head) * (job->padded_dv + 2);
  float *scratch = job->scratch + worker * job->worker_size;
  if (job->is_half)
    attend_typed(job, &job->splits[split], partial, scratch, first_kv, last_kv, 1);
  else
    attend_typed(job, &job->splits[split], partial, scratch, first_kv, last_kv, 0);
}

static void merge_task(void *opaque, int64_t sequence, int64_t worker) {
  (void)worker;
  const job_t *job = opaque;
  const int64_t width = job->padded_dv + 2;
  const int64_t first = job->first_split[sequence], last = job->first_split[sequence + 1];
  for (int64_t h = 0; h < job->num_heads; h++) {
    int64_t out = (sequence * job->num_heads + h) * job->dv;
    float maximum = job->sinks ? job->sinks[h] : -INFINITY;
    for (int64_t s = first; s < last; s++) {
      float found = job->partials[(s * job->num_heads + h) * width];
      maximum = found > maximum || found != found ? found : maximum;
    }
    float sum = job->sinks ? expf(job->sinks[h] - maximum) : 0.0f;
    float *acc = job->partials + (first * job->num_heads + h) * width;
    for (int64_t s = first; s < last; s++) {
      const float *state = job->partials + (s * job->num_heads + h) * width;
      float weight = expf(state[0] - maximum);
      sum += weight * state[1];
      for (int64_t i = 2; i < width; i++)
        acc[i] = s == first ? weight * state[i] : fma1(weight, state[i], acc[i]);
    }
    for (int64_t i = 0; i < job->dv; i++)
      store1(job->out, out + i, first == last ? 0.0f : acc[i + 2] / sum, job->is_half);
  }
}

/* Check lengths and pages, and count or write the splits. */
static int64_t cut(job_t *job, const int32_t *lens, int64_t num_sequences, int64_t max_pages,
                   int64_t num_slots, int64_t window, int64_t *num_splits) {
  *num_splits = 0;
  for (int64_t b = 0; b < num_sequences; b++) {
    int64_t stop = lens[b], start = window > 0 && stop > window ? stop - window : 0;
    if (job->first_split) job->first_split[b] = (int32_t)*num_splits;
    if (stop < 0 || stop > max_pages * job->page_size) return problem(BAD_LENGTH, b);
    while (start < stop) {
      int64_t next = (start / SPLIT + 1) * SPLIT;
      if (next > stop) next = stop;
      if (job->splits)
        job->splits[*num_splits] = (split_t){(int32_t)b, (int32_t)start, (int32_t)next};
      else
        for (int64_t page = start / job->page_size; page <= (next - 1) / job->page_size; page++) {
          int64_t id = job->page_table[b * job->page_stride + page];
          if (id < 0 || (id + 1) * job->page_size > num_slots) return problem(BAD_PAGE, b);
        }
      ++*num_splits;
      start = next;
    }
  }
  if (job->first_split) job->first_split[num_sequences] = (int32_t)*num_splits;
  return 0;
}

/* ---------------------------------------------------------------- entry
 * out [num_sequences, num_heads, dv] is contiguous; q, k and v have a stride per sequence or token slot
 * and one per head, their last dimension is contiguous. Everything that indexes memory is checked first. */
int64_t polyadapt_paged_attention(void *out, const void *q, const void *k, const void *v,
                                  const int32_t *page_table, const int32_t *kv_lens, const float *sinks,
                                  const int64_t *strides, int64_t page_stride, int64_t num_sequences,
                                  int64_t num_heads, int64_t num_kv_heads, int64_t d, int64_t dv,
                                  int64_t num_slots, int64_t max_pages, int64_t page_size, int64_t window,
                                  double scale, double softcap, int64_t is_half, int64_t threads) {
  job_t job = {.out = out, .q = q, .k = k, .v = v, .sinks = sinks, .page_table = page_table,
               .q_strides = {strides[0], strides[1]}, .k_strides = {strides[2], strides[3]},
               .v_strides = {strides[4], strides[5]}, .page_stride = page_stride,
               .num_heads = num_heads, .num_kv_heads = num_kv_heads, .d = d, .dv = dv,
               .padded_d = padded(d), .padded_dv = padded(dv), .page_size = page_size,
               .scale = (float)scale, .softcap = (float)softcap, .is_half = (int)is_half};
  int64_t num_splits, result;
  if ((result = cut(&job, kv_lens, num_sequences, max_pages, num_slots, window, &num_splits)))
    return result;
  int64_t longest = job.padded_d > job.padded_dv ? job.padded_d : job.padded_dv;
  job.worker_size = padded(num_heads * (job.padded_d + SPLIT) + KEYS * longest + 64);
  /* One thread where the whole is a few microseconds; heads part a split only when splits are scarce. */
  int64_t num_keys = 0;
  for (int64_t b = 0; b < num_sequences; b++)
    num_keys += window > 0 && kv_lens[b] > window ? window : kv_lens[b];
  if (num_keys * num_heads * (d + dv) < COST_TO_THREAD || threads < 1) threads = 1;
  job.num_head_parts = 1;
  if (threads > 1 && num_splits < 4 * threads && num_splits > 0) {
    job.num_head_parts = (4 * threads + num_splits - 1) / num_splits;
    if (job.num_head_parts > num_kv_heads) job.num_head_parts = num_kv_heads;
  }
  size_t partials = (size_t)(num_splits * num_heads * (job.padded_dv + 2));
  job.partials = malloc((partials + (size_t)(threads * job.worker_size)) * sizeof(float));
  job.first_split = malloc((size_t)(num_sequences + 1) * sizeof(int32_t));
  job.splits = malloc((size_t)(num_splits + 1) * sizeof(split_t));
  if (job.partials && job.first_split && job.splits) {
    job.scratch = job.partials + partials;
    cut(&job, kv_lens, num_sequences, max_pages, num_slots, window, &num_splits);
    run_tasks(attend_task, &job, num_splits * job.num_head_parts, threads);
    run_tasks(merge_task, &job, num_sequences, num_splits * num_heads < 512 ? 1 : threads);
  } else {
    result = problem(NO_MEMORY, 0);
  }
  free(job.partials), free(job.first_split), free(job.splits);
  return result;
}
