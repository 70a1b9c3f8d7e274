/* The gated segmented low-rank product: y[t] += B (g * A x[t]), each row with its own segment's A and B.
 *
 * Semantics: for each segment s, (offset, rank, parts, routing) = cells[slots[s], site]; offset < 0: nothing.
 * Behind A lie the router's rows, behind B bias if bit 0 of parts is set, out_scale if bit 1 is, and the
 * router's bias if bit 2 is; other parts are not read here.
 *   for each row t = rows[p], bounds[s] <= p < bounds[s + 1]:
 *     h[i] = scales[s] * sum_k A[i, k] x[t, k]                (embedding: scales[s] * A[ids[t], i])
 *     h[i] = gate[t, i] != 0 ? gate[t, i] * h[i] : 0          (i below the gate's width)
 *     h[i] = w[i] != 0 ? w[i] * h[i] : 0                      (w of the routing, see routing.c)
 *   with the hinge of routing.c in place of the sum over k where the routing is one.
 *     y[t, :] += out_scale[:] * y[t, :] + sum_i h[i] B[i, :] + scales[s] * bias[:]
 * Several sites that share x may be done in one call, each with its own columns of y.
 * Every weight is read once per tile of ROW_TILE rows. Sums are float32: over k in lanes, over i in
 * order.
 */
#include <stdlib.h>

#include "calls.h"
#include "tasks.h"
#include "vector.h"

enum { ROW_TILE = 32, MAX_COLUMNS = 2048, NUM_LOCAL_SEGMENTS = 64 };

/* One row alone reads its weights as one stream, which is what a processor prefetches best, with a hint
 * AHEAD bytes in front. Two rows share each weight and take several rows of weights at a time. Either way
 * a dot product has CHAINS sums and a column of y adds its components in order: the same bits. */
enum { CHAINS = 2, GROUP = 2, SOLO = 1, WIDE = 4, AHEAD = 1024 };
enum { HAS_BIAS = 1, HAS_OUT_SCALE = 2, HAS_ROUTER_BIAS = 4 }; /* of a cell's parts; see ops/cells.py */
enum { NO_MEMORY = 1, BAD_SLOT, BAD_ROW, BAD_CELL, BAD_BOUNDS, BAD_TOKEN, BAD_PART, NO_TABLE };

/* Estimated time in units of about 0.05 ns: a weight's bytes from memory, and its product per row. */
enum { COST_PER_BYTE = 2, COST_TO_THREAD = 400000, COST_OF_TASK = 30000 };

typedef struct {
  const void *a, *b, *bias, *out_scale, *router_bias; /* the last three may be NULL */
  float *h;                          /* [segment rows, width] */
  int64_t slot, rank, width, start, stop; /* width: rank and the rows of the router */
  routing_t routing;                 /* router 0: none */
  int64_t column, num_out; /* the columns of y that are this segment's */
  float scale;
} segment_t;

typedef struct {
  int32_t segment, start, stop; /* positions of rows */
  int32_t low, high;            /* components, or columns of y */
} task_t;

typedef struct {
  void *y;
  const void *x;      /* NULL for an embedding */
  const int64_t *ids; /* NULL for a linear */
  const int32_t *rows;
  const float *gate, *table; /* may be NULL, and so may usage */
  float *usage;
  int64_t y_stride, x_stride, gate_stride, gate_width, table_stride, num_in;
  int y_half, arena_half;
  segment_t *segments;
  task_t *tasks;
} job_t;

/* ---------------------------------------------------------------- h = gate * scale * A x */
INLINE float scaled(const job_t *job, const segment_t *segment, int64_t row, int64_t i, float component) {
  float h = component * segment->scale;
  if (!job->gate || i >= job->gate_width) return h;
  float weight = job->gate[row * job->gate_stride + i];
  return weight != 0.0f ? weight * h : 0.0f;
}

/* What stands in h for component i, or a score, until route() has seen it. */
INLINE float gated(const job_t *job, const segment_t *segment, int64_t row, int64_t i, float dot) {
  if (i >= segment->rank || segment->routing.router == ROUTER_HINGE) return dot;
  return scaled(job, segment, row, i, dot);
}

INLINE int is_shut(const job_t *job, const segment_t *segment, const int32_t *rows, int num_rows, int64_t low,
                   int64_t high) {
  if (!job->gate || high > job->gate_width || high > segment->rank) return 0;
  for (int r = 0; r < num_rows; r++)
    for (int64_t i = low; i < high; i++)
      if (job->gate[rows[r] * job->gate_stride + i] != 0.0f) return 0;
  return 1;
}

INLINE void fetch_ahead(const void *base, int64_t index, int num, int is_half) {
  const char *first = (const char *)at(base, index, is_half) + AHEAD;
  for (size_t byte = 0; byte < (size_t)num * element_size(is_half); byte += 64)
    __builtin_prefetch(first + byte);
}

/* Components low..low+num_components-1 of num_rows rows; both counts are constants where inlined. */
INLINE void shrink_block(const job_t *job, const segment_t *segment, int64_t p, int num_rows,
                         int64_t low, int num_components, int x_half, int a_half) {
  const int32_t *rows = job->rows + p;
  float *h = segment->h + (p - segment->start) * segment->width;
  if (is_shut(job, segment, rows, num_rows, low, low + num_components)) {
    for (int r = 0; r < num_rows; r++)
      for (int c = 0; c < num_components; c++) h[r * segment->width + low + c] = 0.0f;
    return;
  }
  const int64_t num_in = job->num_in;
  const void *x[2];
  const void *a[GROUP];
  for (int r = 0; r < num_rows; r++) x[r] = at(job->x, rows[r] * job->x_stride, x_half);
  for (int c = 0; c < num_components; c++) a[c] = at(segment->a, (low + c) * num_in, a_half);
  vf sums[2][GROUP][CHAINS] = {0};
  int64_t k = 0;
  for (; k + CHAINS * LANES <= num_in; k += CHAINS * LANES) {
    if (num_rows == 1)
      for (int c = 0; c < num_components; c++) fetch_ahead(a[c], k, CHAINS * LANES, a_half);
    for (int chain = 0; chain < CHAINS; chain++) {
      vf xs[2];
      for (int r = 0; r < num_rows; r++) xs[r] = loadv(x[r], k + chain * LANES, x_half);
      for (int c = 0; c < num_components; c++) {
        vf weight = loadv(a[c], k + chain * LANES, a_half);
        for (int r = 0; r < num_rows; r++) sums[r][c][chain] = fmav(weight, xs[r], sums[r][c][chain]);
      }
    }
  }
  for (; k + LANES <= num_in; k += LANES)
    for (int c = 0; c < num_components; c++) {
      vf weight = loadv(a[c], k, a_half);
      for (int r = 0; r < num_rows; r++)
        sums[r][c][0] = fmav(weight, loadv(x[r], k, x_half), sums[r][c][0]);
    }
  for (int r = 0; r < num_rows; r++)
    for (int c = 0; c < num_components; c++) {
      vf sum = sums[r][c][0];
      for (int chain = 1; chain < CHAINS; chain++) sum += sums[r][c][chain];
      float dot = sum_lanes(sum);
      for (int64_t tail = k; tail < num_in; tail++)
        dot = fma1(load1(a[c], tail, a_half), load1(x[r], tail, x_half), dot);
      h[r * segment->width + low + c] = gated(job, segment, rows[r], low + c, dot);
    }
}

INLINE void shrink_rows(const job_t *job, const segment_t *segment, int64_t p, int num_rows, int64_t low,
                        int64_t high, int x_half, int a_half) {
  if (num_rows == 2)
    for (; low + GROUP <= high; low += GROUP)
      shrink_block(job, segment, p, 2, low, GROUP, x_half, a_half);
  for (; low < high; low++) shrink_block(job, segment, p, num_rows, low, 1, x_half, a_half);
}

INLINE void shrink_typed(const job_t *job, const segment_t *segment, const task_t *task, int x_half,
                         int a_half) {
  /* Few rows: the weights stream past them. Many: a group of weight rows stays while the rows pass. */
  int64_t step = task->stop - task->start > 2 ? GROUP : task->high;
  for (int64_t low = task->low; low < task->high; low += step) {
    int64_t high = low + step < task->high ? low + step : task->high;
    int64_t p = task->start;
    for (; p + 2 <= task->stop; p += 2) shrink_rows(job, segment, p, 2, low, high, x_half, a_half);
    if (p < task->stop) shrink_rows(job, segment, p, 1, low, high, x_half, a_half);
  }
}

static void look_up(const job_t *job, const segment_t *segment, const task_t *task) {
  for (int64_t p = task->start; p < task->stop; p++) {
    int64_t row = job->rows[p];
    const void *a = at(segment->a, job->ids[row] * segment->rank, job->arena_half);
    float *h = segment->h + (p - segment->start) * segment->width;
    for (int64_t i = task->low; i < task->high; i++)
      h[i] = gated(job, segment, row, i, load1(a, i, job->arena_half));
  }
}

static void shrink(const job_t *job, const task_t *task) {
  const segment_t *segment = &job->segments[task->segment];
  if (job->ids)
    look_up(job, segment, task);
  else if (job->y_half)
    job->arena_half ? shrink_typed(job, segment, task, 1, 1) : shrink_typed(job, segment, task, 1, 0);
  else
    job->arena_half ? shrink_typed(job, segment, task, 0, 1) : shrink_typed(job, segment, task, 0, 0);
}

/* ---------------------------------------------------------------- h *= what the router makes of x */
/* Positions start..stop-1, whose h and scores are whole. */
static void route(const job_t *job, const segment_t *segment, int64_t start, int64_t stop) {
  if (!segment->routing.router) return;
  for (int64_t p = start; p < stop; p++) {
    float *h = segment->h + (p - segment->start) * segment->width, *scores = h + segment->rank;
    if (segment->routing.router == ROUTER_HINGE) {
      polyadapt_hinge(&segment->routing, segment->rank, h, segment->routing.num_rows ? scores : NULL,
                      segment->router_bias, job->arena_half);
      for (int64_t i = 0; i < segment->rank; i++) h[i] = scaled(job, segment, job->rows[p], i, h[i]);
      continue; /* a component is no expert: nothing is noted */
    }
    if (segment->routing.router == ROUTER_TABLE)
      scores = (float *)job->table + job->rows[p] * job->table_stride + segment->routing.column;
    float weights[MAX_CHOICES];
    polyadapt_weigh(&segment->routing, segment->rank, scores, segment->router_bias, job->arena_half, weights);
    if (job->usage)
      polyadapt_note_usage(job->usage, segment->slot, weights, segment->rank, segment->routing.num_scores);
    for (int64_t i = 0; i < segment->rank; i++) h[i] = weights[i] != 0.0f ? weights[i] * h[i] : 0.0f;
  }
}

/* ---------------------------------------------------------------- y += h B + scale * bias */
/* delta[r][:] += sum of num_components components of h times rows of B. */
INLINE void expand_block(const segment_t *segment, float (*delta)[MAX_COLUMNS], const float *h,
                         int num_rows, int64_t i, int num_components, int64_t low, int64_t width,
                         int64_t num_out, int b_half) {
  const void *b[WIDE];
  float weights[2][WIDE];
  int is_zero = 1;
  for (int c = 0; c < num_components; c++) {
    b[c] = at(segment->b, (i + c) * num_out + low, b_half);
    for (int r = 0; r < num_rows; r++) {
      weights[r][c] = h[r * segment->width + i + c];
      is_zero &= weights[r][c] == 0.0f;
    }
  }
  if (is_zero) return;
  int64_t o = 0;
  for (; o + 2 * LANES <= width; o += 2 * LANES) {
    if (num_rows == 1)
      for (int c = 0; c < num_components; c++) fetch_ahead(b[c], o, 2 * LANES, b_half);
    for (int half = 0; half < 2; half++) {
      vf sums[2];
      for (int r = 0; r < num_rows; r++) sums[r] = *(const vf_any *)&delta[r][o + half * LANES];
      for (int c = 0; c < num_components; c++) {
        vf column = loadv(b[c], o + half * LANES, b_half);
        for (int r = 0; r < num_rows; r++) sums[r] = fmav(splat(weights[r][c]), column, sums[r]);
      }
      for (int r = 0; r < num_rows; r++) *(vf_any *)&delta[r][o + half * LANES] = sums[r];
    }
  }
  for (; o + LANES <= width; o += LANES) {
    vf sums[2];
    for (int r = 0; r < num_rows; r++) sums[r] = *(const vf_any *)&delta[r][o];
    for (int c = 0; c < num_components; c++) {
      vf column = loadv(b[c], o, b_half);
      for (int r = 0; r < num_rows; r++) sums[r] = fmav(splat(weights[r][c]), column, sums[r]);
    }
    for (int r = 0; r < num_rows; r++) *(vf_any *)&delta[r][o] = sums[r];
  }
  for (; o < width; o++)
    for (int r = 0; r < num_rows; r++)
      for (int c = 0; c < num_components; c++)
        delta[r][o] = fma1(weights[r][c], load1(b[c], o, b_half), delta[r][o]);
}

/* delta += vector[low..] times y, or times the segment's scale where y is NULL. */
INLINE void add_scaled(const segment_t *segment, float *delta, const void *vector, const void *y, int64_t low,
                       int64_t width, int y_half, int b_half) {
  int64_t o = 0;
  for (; o + LANES <= width; o += LANES) {
    vf factor = y ? loadv(y, o, y_half) : splat(segment->scale);
    *(vf_any *)&delta[o] = fmav(factor, loadv(vector, low + o, b_half), *(vf_any *)&delta[o]);
  }
  for (; o < width; o++)
    delta[o] = fma1(y ? load1(y, o, y_half) : segment->scale, load1(vector, low + o, b_half), delta[o]);
}

INLINE void expand_rows(const job_t *job, const segment_t *segment, int64_t p, int num_rows, int64_t low,
                        int64_t width, int y_half, int b_half) {
  float delta[2][MAX_COLUMNS];
  const float *h = segment->h + (p - segment->start) * segment->width;
  for (int r = 0; r < num_rows; r++) memset(delta[r], 0, (size_t)width * sizeof(float));
  int64_t i = 0;
  const int64_t group = num_rows == 1 ? SOLO : WIDE;
  for (; i + group <= segment->rank; i += group)
    expand_block(segment, delta, h, num_rows, i, num_rows == 1 ? SOLO : WIDE, low, width, segment->num_out,
                 b_half);
  for (; i < segment->rank; i++)
    expand_block(segment, delta, h, num_rows, i, 1, low, width, segment->num_out, b_half);
  for (int r = 0; r < num_rows; r++) {
    int64_t first = job->rows[p + r] * job->y_stride + segment->column + low;
    void *y = (char *)job->y + first * (int64_t)element_size(y_half);
    if (segment->bias) add_scaled(segment, delta[r], segment->bias, NULL, low, width, y_half, b_half);
    if (segment->out_scale) add_scaled(segment, delta[r], segment->out_scale, y, low, width, y_half, b_half);
    for (int64_t o = 0; o < width; o++) store1(y, o, load1(y, o, y_half) + delta[r][o], y_half);
  }
}

INLINE void expand_typed(const job_t *job, const segment_t *segment, const task_t *task, int y_half,
                         int b_half) {
  /* With several rows the block of B must stay in the cache while they pass. */
  int64_t block = MAX_COLUMNS;
  if (task->stop - task->start > 2) {
    block = 32768 / (segment->rank + 1) / 64 * 64;
    block = block < 64 ? 64 : block > MAX_COLUMNS ? MAX_COLUMNS : block;
  }
  for (int64_t low = task->low; low < task->high; low += block) {
    int64_t width = task->high - low < block ? task->high - low : block;
    int64_t p = task->start;
    for (; p + 2 <= task->stop; p += 2) expand_rows(job, segment, p, 2, low, width, y_half, b_half);
    if (p < task->stop) expand_rows(job, segment, p, 1, low, width, y_half, b_half);
  }
}

static void expand(const job_t *job, const task_t *task) {
  const segment_t *segment = &job->segments[task->segment];
  if (job->y_half)
    job->arena_half ? expand_typed(job, segment, task, 1, 1) : expand_typed(job, segment, task, 1, 0);
  else
    job->arena_half ? expand_typed(job, segment, task, 0, 1) : expand_typed(job, segment, task, 0, 0);
}

/* ---------------------------------------------------------------- dividing the work */
static void shrink_task(void *job, int64_t id, int64_t worker) {
  (void)worker;
  shrink(job, &((job_t *)job)->tasks[id]);
}

static void expand_task(void *job, int64_t id, int64_t worker) {
  (void)worker;
  expand(job, &((job_t *)job)->tasks[id]);
}

static void route_task(void *opaque, int64_t id, int64_t worker) {
  (void)worker;
  job_t *job = opaque;
  const task_t *task = &job->tasks[id];
  route(job, &job->segments[task->segment], task->start, task->stop);
}

/* A whole segment's tile: its A and then its B, neighbours in the arena. */
static void whole_task(void *opaque, int64_t id, int64_t worker) {
  (void)worker;
  job_t *job = opaque;
  task_t task = job->tasks[id];
  const segment_t *segment = &job->segments[task.segment];
  task.low = 0, task.high = (int32_t)segment->width;
  shrink(job, &task);
  route(job, segment, task.start, task.stop);
  task.high = (int32_t)segment->num_out;
  expand(job, &task);
}

static int64_t cost_per_weight(const job_t *job, int64_t num_rows) {
  return COST_PER_BYTE * (int64_t)element_size(job->arena_half) + num_rows;
}

/* Cut every segment into tiles of rows and those into ranges of components or of columns of y.
 * With `limit` 0 a tile is not cut further. Writes to job->tasks unless that is NULL; returns the count. */
static int64_t cut(const job_t *job, int64_t num_segments, int by_component, int64_t limit) {
  int64_t num_tasks = 0;
  for (int64_t s = 0; s < num_segments; s++) {
    const segment_t *segment = &job->segments[s];
    int64_t span = by_component ? segment->width : segment->num_out;
    int64_t length = by_component ? job->num_in : segment->rank;
    int64_t unit = by_component ? GROUP : 64;
    for (int64_t start = segment->start; start < segment->stop; start += ROW_TILE) {
      int64_t stop = start + ROW_TILE < segment->stop ? start + ROW_TILE : segment->stop;
      int64_t step = span;
      if (limit) {
        int64_t unit_cost = unit * (length + 1) * cost_per_weight(job, stop - start);
        step = unit * (limit / unit_cost > 0 ? limit / unit_cost : 1);
      }
      int64_t low = 0;
      do {
        int64_t high = low + step < span ? low + step : span;
        if (job->tasks)
          job->tasks[num_tasks] = (task_t){(int32_t)s, (int32_t)start, (int32_t)stop, (int32_t)low,
                                           (int32_t)high};
        num_tasks++;
        low = high;
      } while (low < span);
    }
  }
  return num_tasks;
}

static int64_t run_cut(job_t *job, int64_t num_segments, int by_component, int64_t limit, task_fn task,
                       int64_t threads) {
  job->tasks = NULL;
  int64_t num_tasks = cut(job, num_segments, by_component, limit);
  job->tasks = malloc((size_t)num_tasks * sizeof(task_t));
  if (!job->tasks) return problem(NO_MEMORY, 0);
  cut(job, num_segments, by_component, limit);
  run_tasks(task, job, num_tasks, threads);
  free(job->tasks);
  return 0;
}

static int64_t run(job_t *job, int64_t num_segments, int64_t threads) {
  int64_t total = 0, largest = 0;
  for (int64_t s = 0; s < num_segments; s++) {
    const segment_t *segment = &job->segments[s];
    int64_t weights = segment->width * (job->ids ? 1 : job->num_in) + segment->rank * segment->num_out;
    int64_t num_rows = segment->stop - segment->start;
    int64_t num_tiles = (num_rows + ROW_TILE - 1) / ROW_TILE;
    int64_t tile = weights * cost_per_weight(job, num_rows < ROW_TILE ? num_rows : ROW_TILE);
    total += tile * num_tiles;
    largest = tile > largest ? tile : largest;
  }
  if (total < COST_TO_THREAD) threads = 1;
  /* Whole tiles spare a second round of tasks; good where none is a large part of a thread's share. */
  if (threads <= 1 || largest * threads * 4 <= total)
    return run_cut(job, num_segments, 0, 0, whole_task, threads);
  int64_t limit = total / (threads * 8);
  if (limit < COST_OF_TASK) limit = COST_OF_TASK;
  int64_t result = run_cut(job, num_segments, 1, limit, shrink_task, threads);
  if (result) return result;
  int is_routed = 0;
  for (int64_t s = 0; s < num_segments; s++) is_routed |= job->segments[s].routing.router != 0;
  if (is_routed && (result = run_cut(job, num_segments, 0, 0, route_task, threads))) return result;
  return run_cut(job, num_segments, 0, limit, expand_task, threads);
}

/* ---------------------------------------------------------------- entry */
/* Everything that indexes memory is checked before y is touched. A row is in at most one segment. */
int64_t polyadapt_gated_matmul(const gated_call_t *call) {
  const int64_t num_segments = call->num_segments, num_in = call->num_in;
  const int64_t num_pairs = num_segments * call->num_parts;
  const part_t *parts = (const part_t *)call->parts;
  const int64_t arena_size = call->arena_size;
  const int64_t *cells = (const int64_t *)call->cells, *ids = (const int64_t *)call->ids;
  const int32_t *rows = (const int32_t *)call->rows, *bounds = (const int32_t *)call->bounds;
  const int32_t *slots = (const int32_t *)call->slots;
  const float *scales = (const float *)call->scales;
  const void *arena = (const void *)call->arena;
  const int arena_half = (int)call->is_arena_half;
  job_t job = {.y = (void *)call->y, .x = (const void *)call->x, .ids = ids, .rows = rows,
               .gate = (const float *)call->gate, .table = (const float *)call->table,
               .usage = (float *)call->usage,
               .y_stride = call->y_stride, .x_stride = call->x_stride, .gate_stride = call->gate_stride,
               .gate_width = call->gate_width, .table_stride = call->table_stride, .num_in = num_in,
               .y_half = (int)call->is_y_half, .arena_half = arena_half};
  segment_t local[NUM_LOCAL_SEGMENTS];
  float local_h[4096];
  segment_t *segments = local;
  if (num_pairs > NUM_LOCAL_SEGMENTS) segments = malloc((size_t)num_pairs * sizeof(segment_t));
  if (!segments) return problem(NO_MEMORY, 0);
  int64_t num_active = 0, num_h = 0, result = 0;
  for (int64_t part = 0; part < call->num_parts && !result; part++)
    if (parts[part].site < 0 || parts[part].site >= call->num_sites || parts[part].column < 0 ||
        parts[part].num_out < 0 || parts[part].column > call->num_columns - parts[part].num_out)
      result = problem(BAD_PART, part);
  for (int64_t s = 0; s < num_segments && !result; s++) {
    int64_t start = bounds[s], stop = bounds[s + 1], slot = slots[s];
    if (start < 0 || stop < start || stop > call->num_positions) result = problem(BAD_BOUNDS, s);
    else if (slot < 0 || slot >= call->num_slots) result = problem(BAD_SLOT, s);
    for (int64_t p = start; p < stop && !result; p++) {
      if (rows[p] < 0 || rows[p] >= call->num_rows) result = problem(BAD_ROW, p);
      else if (ids && (ids[rows[p]] < 0 || ids[rows[p]] >= num_in)) result = problem(BAD_TOKEN, rows[p]);
    }
    for (int64_t part = 0; part < call->num_parts && start < stop && !result; part++) {
      const int64_t *cell = cells + (slot * call->num_sites + parts[part].site) * 4;
      int64_t offset = cell[0], rank = cell[1], num_out = parts[part].num_out;
      int64_t has_bias = cell[2] & HAS_BIAS, has_scale = (cell[2] & HAS_OUT_SCALE) != 0;
      int64_t has_router_bias = (cell[2] & HAS_ROUTER_BIAS) != 0;
      routing_t routing = polyadapt_routing(cell[3]);
      if (offset < 0 || routing.router == ROUTER_EXPERTS || (rank == 0 && !has_bias && !has_scale)) continue;
      int64_t width = rank + routing.num_rows;
      if (rank < 0 || offset > arena_size || rank > arena_size ||
          offset + width * num_in + (rank + has_bias + has_scale) * num_out + has_router_bias * rank >
              arena_size ||
          (routing.router && (routing.num_scores == 0 || rank % routing.num_scores || rank > MAX_CHOICES ||
                              (routing.router != ROUTER_TABLE && routing.router != ROUTER_HINGE &&
                               routing.num_rows == 0) ||
                              (routing.router == ROUTER_HINGE && (ids || routing.num_scores != 1)) ||
                              (ids && routing.num_rows)))) {
        result = problem(BAD_CELL, s);
        continue;
      }
      if (routing.router == ROUTER_TABLE &&
          (!call->table || routing.column + routing.num_scores > call->table_width)) {
        result = problem(NO_TABLE, s);
        continue;
      }
      const void *b = at(arena, offset + width * num_in, arena_half);
      const int64_t tail = rank * num_out;
      segments[num_active++] =
          (segment_t){.a = at(arena, offset, arena_half), .b = b,
                      .bias = has_bias ? at(b, tail, arena_half) : NULL,
                      .out_scale = has_scale ? at(b, tail + has_bias * num_out, arena_half) : NULL,
                      .router_bias = has_router_bias
                                         ? at(b, tail + (has_bias + has_scale) * num_out, arena_half)
                                         : NULL,
                      .slot = slot, .rank = rank, .width = width, .routing = routing,
                      .start = start, .stop = stop, .column = parts[part].column, .num_out = num_out,
                      .scale = scales[s]};
      num_h += (stop - start) * width;
    }
  }
  float *h = local_h;
  if (!result && num_h > 4096 && !(h = malloc((size_t)num_h * sizeof(float))))
    result = problem(NO_MEMORY, 0);
  if (!result && num_active) {
    float *next = h;
    for (int64_t s = 0; s < num_active; s++) {
      segments[s].h = next;
      next += (segments[s].stop - segments[s].start) * segments[s].width;
    }
    job.segments = segments;
    result = run(&job, num_active, call->threads);
  }
  if (h != local_h) free(h);
  if (segments != local) free(segments);
  return result;
}
