"""The capacity planner: the real scheduler, block manager, step loop and router on a virtual clock,
with a model of step times in the place of the device.

Reading order:

    step_times      how long a step takes, by what it computes; fitted to measurements
    roofline        the same, estimated from a table of GPUs
    calibration     the file with measured step times, and facts about the engine they are of
    measuring       makes that file on a device
    planned_engine  one engine on a virtual clock
    planned_fleet   arrivals, several engines and a router; the latencies that come of it
    layout          a fleet to plan: how many engines, on how many GPUs each
    capacity        the highest rate within bounds, and what breaks beyond it

It may import core and fleet, and what these may.
"""
