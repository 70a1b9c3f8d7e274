/* Run numbered tasks on up to `threads` threads of the OpenMP runtime that the process already has.
 *
 * Threads take tasks from a counter: which thread runs a task never changes a result. Without OpenMP
 * the caller runs them all.
 */
#ifndef POLYADAPT_TASKS_H
#define POLYADAPT_TASKS_H

#include <stdint.h>

/* `worker` is unique among the threads of one run and below `threads`. */
typedef void (*task_fn)(void *job, int64_t task, int64_t worker);

static void run_tasks(task_fn task, void *job, int64_t num_tasks, int64_t threads) {
  if (threads > num_tasks) threads = num_tasks;
  if (threads <= 1) {
    for (int64_t id = 0; id < num_tasks; id++) task(job, id, 0);
    return;
  }
  int64_t next_task = 0, next_worker = 0;
#pragma omp parallel num_threads((int)threads)
  {
    int64_t worker = __atomic_fetch_add(&next_worker, 1, __ATOMIC_RELAXED);
    for (;;) {
      int64_t id = __atomic_fetch_add(&next_task, 1, __ATOMIC_RELAXED);
      if (id >= num_tasks) break;
      task(job, id, worker);
    }
  }
}

/* A problem and the index it was found at, in one number; 0 is success. Python turns it into words. */
static inline int64_t problem(int64_t code, int64_t index) { return code + (index << 8); }

#endif
