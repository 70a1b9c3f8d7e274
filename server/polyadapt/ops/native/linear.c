/* The base product: y[t, n] = sum over k of x[t, k] W[n, k], plus bias[n].
 *
 * W lies in panels of PANEL outputs, [panels, num_in, PANEL], zeros past num_out: one row of x reads memory
 * as a few plain streams, and many rows find a panel in the cache. bfloat16 weights become float32 in
 * registers. Every y[t, n] adds its products one after another in the order of k, so that its bits depend on
 * its own row and weights alone: not on other rows, their number, the tiling or the threads.
 */
#include <stdlib.h>

#include "calls.h"
#include "tasks.h"
#include "vector.h"

enum { PANEL = 16, VECTORS = PANEL / LANES };
/* A tile of rows by panels keeps its sums in registers: six rows of one panel, or fewer rows of more. */
enum { MAX_ROWS = 6, MAX_PANELS = 4 };
/* Rows of x that one task keeps in the second-level cache while panels pass, and panels of a task. */
enum { BLOCK_BYTES = 256 << 10, MIN_BLOCK_ROWS = 4 * MAX_ROWS, TASKS_PER_THREAD = 4, MAX_TASK_PANELS = 32 };
/* Bytes of W that several rows of x ask for in advance; fewer rows come close to the memory without it. */
enum { AHEAD = 2048 };
/* With fewer products than this a second thread costs more than it takes over. */
enum { COST_TO_THREAD = 60000 };
enum { NO_MEMORY = 1 };

typedef struct {
  const linear_call_t *call;
  const float *x;
  int64_t x_stride, num_panels, row_blocks, block_rows, block_panels;
} job_t;

INLINE void put(const linear_call_t *call, int64_t row, int64_t column, const vf *sums) {
  int64_t num = call->num_out - column, first = row * call->y_stride + column;
  if (num >= PANEL && !call->is_half) {
    for (int v = 0; v < VECTORS; v++) {
      vf sum = sums[v];
      if (call->bias) sum += *(const vf_any *)(call->bias + column + v * LANES);
      *(vf_any *)((float *)call->y + first + v * LANES) = sum;
    }
    return;
  }
  float out[PANEL];
  memcpy(out, sums, sizeof out);
  for (int c = 0; c < PANEL && c < num; c++)
    store1(call->y, first + c, call->bias ? out[c] + call->bias[column + c] : out[c], (int)call->is_half);
}

/* `rows` and `panels` are constants wherever this is inlined. */
INLINE void tile(const job_t *job, int64_t row, int rows, int64_t panel, int panels, int w_half) {
  const int64_t num_in = job->call->num_in, x_stride = job->x_stride, panel_size = num_in * PANEL;
  const float *x = job->x + row * x_stride;
  const void *w = at(job->call->w, panel * panel_size, w_half);
  const int num = panels * VECTORS;
  vf sums[MAX_ROWS][MAX_PANELS * VECTORS];
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < num; c++) sums[r][c] = splat(0.0f);
#pragma GCC unroll 4
  for (int64_t k = 0; k < num_in; k++) {
    vf weights[MAX_PANELS * VECTORS];
    if (rows > 3) __builtin_prefetch((const char *)at(w, k * PANEL, w_half) + AHEAD);
    for (int c = 0; c < num; c++)
      weights[c] = loadv(w, c / VECTORS * panel_size + k * PANEL + c % VECTORS * LANES, w_half);
    for (int r = 0; r < rows; r++) {
      vf left = splat(x[r * x_stride + k]);
      for (int c = 0; c < num; c++) sums[r][c] = fmav(left, weights[c], sums[r][c]);
    }
  }
  for (int r = 0; r < rows; r++)
    for (int p = 0; p < panels; p++) put(job->call, row + r, (panel + p) * PANEL, &sums[r][p * VECTORS]);
}

/* Few rows have too few sums to fill the processor with one panel: they take several at once. */
INLINE void few_rows(const job_t *job, int64_t row, int rows, int64_t low, int64_t high, int panels,
                     int w_half) {
  for (; low + panels <= high; low += panels) tile(job, row, rows, low, panels, w_half);
  for (; low < high; low++) tile(job, row, rows, low, 1, w_half);
}

INLINE void block(const job_t *job, int64_t row, int64_t num, int64_t low, int64_t high, int w_half) {
  if (num == 1) {
    few_rows(job, row, 1, low, high, 4, w_half);
  } else if (num == 2) {
    few_rows(job, row, 2, low, high, 2, w_half);
  } else if (num == 3) {
    few_rows(job, row, 3, low, high, 2, w_half);
  } else {
    int64_t tiles = (num + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t p = low; p < high; p++)
      for (int64_t t = 0; t < tiles; t++) {
        int64_t first = row + t * num / tiles;
        switch (row + (t + 1) * num / tiles - first) {
          case 6: tile(job, first, 6, p, 1, w_half); break;
          case 5: tile(job, first, 5, p, 1, w_half); break;
          case 4: tile(job, first, 4, p, 1, w_half); break;
          default: tile(job, first, 3, p, 1, w_half);
        }
      }
  }
}

static void linear_task(void *opaque, int64_t id, int64_t worker) {
  (void)worker;
  const job_t *job = opaque;
  int64_t low = id / job->row_blocks * job->block_panels, high = low + job->block_panels;
  int64_t row = id % job->row_blocks * job->block_rows, num = job->call->num_rows - row;
  if (high > job->num_panels) high = job->num_panels;
  if (num > job->block_rows) num = job->block_rows;
  if (job->call->w_half)
    block(job, row, num, low, high, 1);
  else
    block(job, row, num, low, high, 0);
}

int64_t polyadapt_linear(const linear_call_t *call) {
  job_t job = {.call = call, .x = call->x, .x_stride = call->x_stride};
  float *copy = NULL;
  if (call->num_rows == 0) return 0;
  if (call->is_half) { /* once here, not once for every panel */
    copy = malloc((size_t)(call->num_rows * call->num_in) * sizeof(float));
    if (!copy) return problem(NO_MEMORY, 0);
    for (int64_t r = 0; r < call->num_rows; r++)
      for (int64_t k = 0; k < call->num_in; k++)
        copy[r * call->num_in + k] = load1(call->x, r * call->x_stride + k, 1);
    job.x = copy, job.x_stride = call->num_in;
  }
  int64_t threads = call->threads;
  if (call->num_rows * call->num_in * call->num_out < COST_TO_THREAD || threads < 1) threads = 1;
  int64_t rows = BLOCK_BYTES / (int64_t)sizeof(float) / call->num_in / MAX_ROWS * MAX_ROWS;
  if (rows < MIN_BLOCK_ROWS) rows = MIN_BLOCK_ROWS;
  job.row_blocks = (call->num_rows + rows - 1) / rows;
  job.block_rows = (call->num_rows + job.row_blocks - 1) / job.row_blocks;
  job.row_blocks = (call->num_rows + job.block_rows - 1) / job.block_rows;
  job.num_panels = (call->num_out + PANEL - 1) / PANEL;
  job.block_panels = job.num_panels / (threads * TASKS_PER_THREAD) / MAX_PANELS * MAX_PANELS;
  if (job.block_panels > MAX_TASK_PANELS) job.block_panels = MAX_TASK_PANELS;
  if (job.block_panels < MAX_PANELS) job.block_panels = MAX_PANELS;
  int64_t panel_blocks = (job.num_panels + job.block_panels - 1) / job.block_panels;
  run_tasks(linear_task, &job, job.row_blocks * panel_blocks, threads);
  free(copy);
  return 0;
}
