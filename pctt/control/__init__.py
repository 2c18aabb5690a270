"""Control by predictive coding: actions are activities, and descend the same energy as beliefs.

One graph serves perception and action. It holds states x_1 .. x_H, predicted each from the one before and
from the action between, and observations predicted from the states:

    F = sum_k 1/2 |x_k - f(x_{k-1}, a_k)|^2_{P_x} + 1/2 |y_k - g(x_k)|^2_{P_y} + 1/2 |0 - a_k|^2_{P_a}

Perception: H = 1, the action that was taken and the observation that came are clamped, the state relaxes:
the filter of temporal predictive coding. Action: the present belief is clamped at x_0 and what the agent
prefers to observe at y_1 .. y_H; states and actions relax together, the first action is taken, and the next
plan begins where this one ended. So an action moves only by the prediction error of what is expected to
follow from it (Friston, Daunizeau, Kilner & Kiebel 2010; Friston, Samothrakis & Montague 2012: preferences
are priors, and control is inference).

The two relax apart. In one relaxation the goal would pull at the belief about the present, too, and the agent
would see what it likes to see.

`pid_agent` is the special case without a plan: the action descends the present sensory prediction error in
generalised coordinates, which is a PID controller (Baltieri & Buckley 2019, "PID control as a process of
active inference with linear generative models", Entropy 21, 257).
"""

from pctt.control.agent import Plan, Planning, PredictiveController
from pctt.control.environment import environment
from pctt.control.model import ControlModel, linear_weights, model_network, trajectory_network
from pctt.control.pid import PIDAgent, pid_agent

__all__ = [
    "ControlModel",
    "PIDAgent",
    "Plan",
    "Planning",
    "PredictiveController",
    "environment",
    "linear_weights",
    "model_network",
    "pid_agent",
    "trajectory_network",
]
