/* An adapter's own experts in place of a whole MLP, for its own rows: ops/mixture.py says what for.
 *
 * Semantics, for each row t of a segment whose slot has a cell of experts at the first of `parts`:
 *   w = what the router there makes of x[t], times the value of down's cell
 *   v[e] = u[t] + B[e] A[e] x[t], of every part in its columns;  a[e] = w[e] * act(v[e])
 *   inner[t] = sum_e a[e];  h = A[e] a[e] of down, expert after expert, and at the end the sum of w
 * and, once the base's down was made of inner,
 *   y[t] += sum_i h[i] B[i] of down + (sum of w - 1) * bias
 * over the experts with w[e] != 0, in order. A row is one task, and its bits depend on nothing else.
 */
#include <stdlib.h>

#include "activation.h"
#include "calls.h"
#include "tasks.h"
#include "vector.h"

enum { CHAINS = 4, WIDE = 4, COLUMNS = 1024 };
enum { COST_TO_THREAD = 60000 }; /* products */
enum { NO_MEMORY = 1, BAD_SLOT, BAD_ROW, BAD_CELL, BAD_BOUNDS };

/* The experts' parts of one cell; rank is -1 where the slot has none. */
typedef struct {
  const void *a, *router, *b;
  int64_t rank, each; /* components of all experts, and of one */
  routing_t routing;
} cell_t;

typedef struct {
  const mixture_call_t *call;
  float *scratch;       /* scratch_size of them per worker */
  int64_t scratch_size, columns, padded; /* `padded` elements hold a row of inner in whole vectors */
  int64_t max_rank, max_scores, num_rows, cost;
} job_t;

/* ---------------------------------------------------------------- cells */
static const int64_t *fields_of(const mixture_call_t *call, int64_t slot, int64_t site) {
  return (const int64_t *)call->cells + (slot * call->num_sites + site) * 4;
}

static cell_t cell_at(const mixture_call_t *call, int64_t slot, int64_t site, int64_t num_in) {
  const int64_t *fields = fields_of(call, slot, site);
  const int half = (int)call->is_arena_half;
  cell_t cell = {.rank = -1, .routing = polyadapt_routing(fields[3])};
  if (fields[0] < 0 || cell.routing.router != ROUTER_EXPERTS) return cell;
  cell.rank = fields[1];
  cell.each = cell.rank / cell.routing.num_scores;
  cell.a = at((const void *)call->arena, fields[0], half);
  cell.router = at(cell.a, cell.rank * num_in, half);
  cell.b = at(cell.router, cell.routing.num_rows * num_in, half);
  return cell;
}

/* Whether a cell is none of experts, or lies inside the arena and has as much for each. */
static int is_whole(const mixture_call_t *call, int64_t slot, int64_t site, int64_t num_in, int64_t num_out) {
  if (site < 0 || site >= call->num_sites) return 0;
  const int64_t *fields = fields_of(call, slot, site), offset = fields[0], rank = fields[1];
  routing_t routing = polyadapt_routing(fields[3]);
  if (offset < 0 || routing.router != ROUTER_EXPERTS) return 1;
  return routing.num_scores > 0 && rank >= 0 && rank <= MAX_CHOICES && rank % routing.num_scores == 0 &&
         offset <= call->arena_size &&
         offset + (rank + routing.num_rows) * num_in + rank * num_out <= call->arena_size;
}

/* Check the cells of one slot, and note what its rows take. The first part has the router. */
static int check_slot(const mixture_call_t *call, job_t *job, int64_t slot, int64_t num_rows) {
  const part_t *parts = (const part_t *)call->parts;
  if (!is_whole(call, slot, call->down, call->width, call->num_out)) return 0;
  const cell_t down = cell_at(call, slot, call->down, call->width);
  int64_t num_scores = 0, num_chosen = 0, cost = 0;
  for (int64_t i = 0; i < call->num_parts; i++) {
    if (!is_whole(call, slot, parts[i].site, call->num_in, parts[i].num_out) || parts[i].column < 0 ||
        parts[i].num_out < 0 || parts[i].column > job->columns - parts[i].num_out)
      return 0;
    const cell_t cell = cell_at(call, slot, parts[i].site, call->num_in);
    if (i == 0) {
      if (cell.rank < 0) return 1; /* the adapter leaves this MLP alone */
      num_scores = cell.routing.num_scores;
      num_chosen = cell.routing.top_k ? cell.routing.top_k : num_scores;
      if (cell.routing.num_rows != num_scores) return 0;
      cost = num_scores * call->num_in;
    }
    if (cell.rank >= 0 && cell.routing.num_scores != num_scores) return 0;
    if (cell.rank > job->max_rank) job->max_rank = cell.rank;
    if (cell.rank > 0) cost += num_chosen * cell.each * (call->num_in + parts[i].num_out);
  }
  if (down.rank < 0 || down.routing.num_scores != num_scores || down.rank >= call->h_stride) return 0;
  if (num_scores > job->max_scores) job->max_scores = num_scores;
  job->cost += num_rows * (cost + num_chosen * (down.each * call->width + 4 * job->columns));
  return 1;
}

static int64_t check(const mixture_call_t *call, job_t *job) {
  const mixture_t *segments = (const mixture_t *)call->segments;
  const int32_t *rows = (const int32_t *)call->rows;
  for (int64_t s = 0; s < call->num_segments; s++) {
    const mixture_t segment = segments[s];
    if (segment.slot < 0 || segment.slot >= call->num_slots) return problem(BAD_SLOT, s);
    if (segment.start < 0 || segment.stop < segment.start || segment.stop > call->num_positions ||
        segment.first < 0 || segment.first + segment.stop - segment.start > call->num_h_rows)
      return problem(BAD_BOUNDS, s);
    for (int64_t p = segment.start; p < segment.stop; p++)
      if (rows[p] < 0 || rows[p] >= call->num_rows) return problem(BAD_ROW, p);
    job->num_rows += segment.stop - segment.start;
    if (!check_slot(call, job, segment.slot, segment.stop - segment.start)) return problem(BAD_CELL, s);
  }
  return 0;
}

/* The id-th row of all segments: its slot, its number in the batch, and its row of h. */
static int64_t locate(const mixture_call_t *call, int64_t id, int64_t *row, float **h) {
  const mixture_t *segment = (const mixture_t *)call->segments;
  for (; id >= segment->stop - segment->start; segment++) id -= segment->stop - segment->start;
  *row = ((const int32_t *)call->rows)[segment->start + id];
  *h = (float *)call->h + (segment->first + id) * call->h_stride;
  return segment->slot;
}

/* ---------------------------------------------------------------- inner and h */
INLINE float dot(const void *a, const void *x, int64_t num, int a_half, int x_half) {
  vf sums[CHAINS] = {0};
  int64_t k = 0;
  for (; k + CHAINS * LANES <= num; k += CHAINS * LANES)
    for (int c = 0; c < CHAINS; c++)
      sums[c] = fmav(loadv(a, k + c * LANES, a_half), loadv(x, k + c * LANES, x_half), sums[c]);
  for (; k + LANES <= num; k += LANES) sums[0] = fmav(loadv(a, k, a_half), loadv(x, k, x_half), sums[0]);
  float sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; k < num; k++) sum = fma1(load1(a, k, a_half), load1(x, k, x_half), sum);
  return sum;
}

/* v[o] += sum of `num` components, in order, of h times rows of b [.., stride]; `num` is a constant. */
INLINE void add_group(float *v, const float *h, const void *const *b, int num, int64_t width, int b_half) {
  int64_t o = 0;
  for (; o + LANES <= width; o += LANES) {
    vf sum = *(const vf_any *)(v + o);
    for (int c = 0; c < num; c++) sum = fmav(splat(h[c]), loadv(b[c], o, b_half), sum);
    *(vf_any *)(v + o) = sum;
  }
  for (; o < width; o++)
    for (int c = 0; c < num; c++) v[o] = fma1(h[c], load1(b[c], o, b_half), v[o]);
}

INLINE void add_components(float *v, const float *h, const void *b, int64_t num, int64_t width, int b_half) {
  const void *group[WIDE];
  int64_t i = 0;
  for (; i + WIDE <= num; i += WIDE) {
    for (int c = 0; c < WIDE; c++) group[c] = at(b, (i + c) * width, b_half);
    add_group(v, h + i, group, WIDE, width, b_half);
  }
  for (; i < num; i++) {
    group[0] = at(b, i * width, b_half);
    add_group(v, h + i, group, 1, width, b_half);
  }
}

/* own = w * act(v), and total += own; both have room for whole vectors. */
static void weigh(const job_t *job, const float *v, float w, float *own, float *total) {
  const int64_t width = job->call->width;
  const int kind = (int)job->call->activation;
  for (int64_t i = 0; i < width; i += LANES) {
    vf a = activate(*(const vf_any *)(v + i), kind);
    if (job->call->is_gated) a *= *(const vf_any *)(v + width + i);
    a *= splat(w);
    *(vf_any *)(own + i) = a;
    *(vf_any *)(total + i) += a;
  }
}

INLINE void mix_row(const job_t *job, int64_t slot, int64_t row, float *h, float *scratch, int half, int b_half) {
  const mixture_call_t *call = job->call;
  const part_t *parts = (const part_t *)call->parts;
  const int64_t num_in = call->num_in, width = call->width, columns = job->columns;
  float *v = scratch, *own = v + columns + LANES, *total = own + job->padded, *weights = total + job->padded;
  float *components = weights + job->max_scores;
  memset(h, 0, (size_t)call->h_stride * sizeof(float));
  const cell_t first = cell_at(call, slot, parts[0].site, num_in), down = cell_at(call, slot, call->down, width);
  if (first.rank < 0) {
    h[call->h_stride - 1] = 1.0f;
    return;
  }
  const void *x = at((const void *)call->x, row * call->x_stride, half);
  const void *u = at((const void *)call->u, row * call->u_stride, half);
  for (int64_t e = 0; e < first.routing.num_scores; e++)
    weights[e] = dot(at(first.router, e * num_in, b_half), x, num_in, b_half, half);
  polyadapt_choose(&first.routing, weights);
  for (int64_t e = 0; e < first.routing.num_scores; e++) weights[e] *= down.routing.value;
  if (call->usage)
    polyadapt_note_usage((float *)call->usage, slot, weights, first.routing.num_scores, first.routing.num_scores);
  memset(total, 0, (size_t)job->padded * sizeof(float));
  float sum = 0.0f;
  for (int64_t e = 0; e < first.routing.num_scores; e++) {
    const float w = weights[e];
    if (w == 0.0f) continue;
    sum += w;
    for (int64_t i = 0; i < columns; i++) v[i] = load1(u, i, half);
    for (int64_t part = 0; part < call->num_parts; part++) {
      const cell_t cell = cell_at(call, slot, parts[part].site, num_in);
      if (cell.rank <= 0) continue;
      const int64_t from = e * cell.each;
      for (int64_t i = 0; i < cell.each; i++)
        components[i] = dot(at(cell.a, (from + i) * num_in, b_half), x, num_in, b_half, half);
      add_components(v + parts[part].column, components, at(cell.b, from * parts[part].num_out, b_half),
                     cell.each, parts[part].num_out, b_half);
    }
    weigh(job, v, w, own, total);
    for (int64_t i = 0; i < down.each; i++)
      h[e * down.each + i] = dot(at(down.a, (e * down.each + i) * width, b_half), own, width, b_half, 0);
  }
  h[call->h_stride - 1] = sum;
  void *inner = (char *)call->inner + row * call->inner_stride * (int64_t)element_size(half);
  for (int64_t i = 0; i < width; i++) store1(inner, i, total[i], half);
}

static void mix_task(void *opaque, int64_t id, int64_t worker) {
  const job_t *job = opaque;
  const int half = (int)job->call->is_half, b_half = (int)job->call->is_arena_half;
  float *h, *scratch = job->scratch + worker * job->scratch_size;
  int64_t row, slot = locate(job->call, id, &row, &h);
  if (half)
    b_half ? mix_row(job, slot, row, h, scratch, 1, 1) : mix_row(job, slot, row, h, scratch, 1, 0);
  else
    b_half ? mix_row(job, slot, row, h, scratch, 0, 1) : mix_row(job, slot, row, h, scratch, 0, 0);
}

/* ---------------------------------------------------------------- y */
INLINE void add_row(const job_t *job, int64_t slot, int64_t row, const float *h, int half, int b_half) {
  const mixture_call_t *call = job->call;
  if (cell_at(call, slot, ((const part_t *)call->parts)[0].site, call->num_in).rank < 0) return;
  const cell_t down = cell_at(call, slot, call->down, call->width);
  const float excess = h[call->h_stride - 1] - 1.0f;
  const float *bias = excess != 0.0f ? (const float *)call->bias : NULL;
  float weights[MAX_CHOICES], delta[COLUMNS];
  const void *b[MAX_CHOICES];
  int64_t num = 0;
  for (int64_t i = 0; i < down.rank; i++) /* of experts that were not chosen they are zero */
    if (h[i] != 0.0f) weights[num] = h[i], b[num++] = at(down.b, i * call->num_out, b_half);
  if (num == 0 && !bias) return;
  void *y = (char *)call->y + row * call->y_stride * (int64_t)element_size(half);
  for (int64_t low = 0; low < call->num_out; low += COLUMNS) {
    const int64_t width = call->num_out - low < COLUMNS ? call->num_out - low : COLUMNS;
    memset(delta, 0, sizeof delta);
    for (int64_t i = 0; i < num; i += WIDE) {
      const void *group[WIDE];
      const int count = num - i < WIDE ? (int)(num - i) : WIDE;
      for (int c = 0; c < count; c++) group[c] = at(b[i + c], low, b_half);
      if (count == WIDE)
        add_group(delta, weights + i, group, WIDE, width, b_half);
      else
        for (int c = 0; c < count; c++) add_group(delta, weights + i + c, group + c, 1, width, b_half);
    }
    for (int64_t o = 0; o < width && bias; o++) delta[o] = fma1(excess, bias[low + o], delta[o]);
    for (int64_t o = 0; o < width; o++) store1(y, low + o, load1(y, low + o, half) + delta[o], half);
  }
}

static void add_task(void *opaque, int64_t id, int64_t worker) {
  (void)worker;
  const job_t *job = opaque;
  const int half = (int)job->call->is_half, b_half = (int)job->call->is_arena_half;
  float *h;
  int64_t row, slot = locate(job->call, id, &row, &h);
  if (half)
    b_half ? add_row(job, slot, row, h, 1, 1) : add_row(job, slot, row, h, 1, 0);
  else
    b_half ? add_row(job, slot, row, h, 0, 1) : add_row(job, slot, row, h, 0, 0);
}

/* ---------------------------------------------------------------- entries */
int64_t polyadapt_mix(const mixture_call_t *call) {
  job_t job = {.call = call, .columns = call->is_gated ? 2 * call->width : call->width};
  int64_t result = check(call, &job);
  if (result || job.num_rows == 0) return result;
  int64_t threads = job.cost < COST_TO_THREAD || call->threads < 1 ? 1 : call->threads;
  job.padded = (call->width + LANES - 1) / LANES * LANES;
  job.scratch_size = job.columns + LANES + 2 * job.padded + job.max_scores + job.max_rank;
  job.scratch = calloc((size_t)(threads * job.scratch_size), sizeof(float));
  if (!job.scratch) return problem(NO_MEMORY, 0);
  run_tasks(mix_task, &job, job.num_rows, threads);
  free(job.scratch);
  return 0;
}

int64_t polyadapt_add_mixed(const mixture_call_t *call) {
  job_t job = {.call = call, .columns = call->is_gated ? 2 * call->width : call->width};
  int64_t result = check(call, &job);
  if (result || job.num_rows == 0) return result;
  int64_t threads = job.cost < COST_TO_THREAD || call->threads < 1 ? 1 : call->threads;
  run_tasks(add_task, &job, job.num_rows, threads);
  return 0;
}
