"""Numbers that the kernel contract (kernels/backend.py) fixes: slots of the state array, purposes of random numbers."""

from __future__ import annotations


class Slot:
    """Slots of the float64 state array.

    STEP..LOSS_RING change during training; the hyper-parameters are written once by the host and read by ``update``.
    """

    STEP = 0  # completed optimiser updates (skipped steps do not count)
    EPOCH = 1  # epoch number, from 1; the third counter word of dequantization noise
    CURSOR = 2  # batches of the current window of rows already presented
    RATE = 3  # learning rate of the next update
    LOSS = 4  # weighted mean negative log-likelihood of the last batch (nats), in the flow's input space
    LOG_PROB_SUM = 5  # sum of weight * log_prob since the host last cleared it
    WEIGHT_SUM = 6  # sum of weights since the host last cleared it
    SKIP = 7  # 1 while the current step's loss is not finite: update leaves the parameters alone
    SKIPPED = 8  # steps skipped so far
    RATE_DECAY = 9  # the rate is divided by this after every update ...
    RATE_FLOOR = 10  # ... but does not fall below this
    MOMENTUM = 11  # AdaM: 1 - beta1 of the paper; RMSProp: the velocity's momentum now
    SQUARE_DECAY = 12  # AdaM: 1 - beta2 of the paper (0.99); RMSProp: averaging coefficient (0.95)
    LAMBDA = 13  # AdaM: decay of the first-moment coefficient
    EPSILON = 14  # AdaM: added to sqrt(vh); RMSProp: the floor of the root mean square
    BAD_GRADIENT = 15  # 1 once an update of the current step met a gradient that is not finite
    LOSS_RING = 32  # losses of the last RING_SIZE steps, at LOSS_RING + cursor % RING_SIZE
    RING_SIZE = 32
    SIZE = 64


class Purpose:
    """What random numbers are for (8 bits): different purposes never share a counter."""

    TRAIN_NOISE = 0
    VALID_NOISE = 1
    TEST_NOISE = 2
    INIT = 3
    SAMPLE = 4
    SHUFFLE = 5
    SPLIT = 6
    DEMO = 7
    CHECK = 8
    INPAINT = 9
    PARTITION = 10
