"""The capacity planner: the real scheduler, block manager, step loop and router on a virtual clock,
with a model of step times in the place of the device.

Reading order:

    step_times      how long a step takes, by what it computes; fitted to measurements
    roofline        the same, estimated from a table of GPUs
    planned_engine  one engine on a virtual clock
    front           HTTP processes on virtual time, as queues
    planned_fleet   arrivals, several engines and a router; the latencies that come of it
    serving         what a server adds to its engine, fitted to runs of a real one
    calibration     the file with all measured times, and facts about the engine they are of
    message_times   measures what an engine takes for messages between its steps
    measuring       makes that file on a device
    layout          a fleet to plan: how many engines, on how many GPUs each
    capacity        the highest rate within bounds, and what breaks beyond it

It may import core and fleet, and what these may.
"""
