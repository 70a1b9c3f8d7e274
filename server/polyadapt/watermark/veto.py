"""How a veto row v with offset o holds a hinge's detectors back, wherever branches are applied:

h = relu(A x - tau - VETO_WEIGHT relu(VETO_LEVEL - (v x + o))). Torch-free.
"""

VETO_WEIGHT, VETO_LEVEL = 6.0, 0.5
