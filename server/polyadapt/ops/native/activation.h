/* The activations of an MLP, on vectors of floats.
 *
 * SiLU: v / (1 + exp(-v)). GELU in its tanh form (Hendrycks and Gimpel 2016):
 * v / 2 (1 + tanh(sqrt(2 / pi) (v + 0.044715 v^3))).
 */
#ifndef POLYADAPT_ACTIVATION_H
#define POLYADAPT_ACTIVATION_H

#include "vector.h"

enum { SILU, GELU_TANH };

INLINE vf activate(vf v, int kind) {
  if (kind == SILU) {
    vf minus = splat(0.0f) - v;
    /* exp_lanes ends at 88: beyond it the quotient is within 1e-36 of 0 either way. */
    minus = choose(minus > splat(88.0f), splat(88.0f), minus);
    return v / (splat(1.0f) + exp_lanes(minus));
  }
  vf inner = splat(0.7978845608f) * fmav(splat(0.044715f) * v, v * v, v);
  return splat(0.5f) * v * (splat(1.0f) + tanh_lanes(inner));
}

#endif
