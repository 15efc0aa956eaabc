"""`tg.gpu`: what a program needs that keeps tensors on a GPU, real or virtual, and captures several plans over them."""

from taskgraph.runtime.gpu.arrays import DeviceArray, DeviceTensors
from taskgraph.runtime.gpu.driver import Gpu
from taskgraph.runtime.gpu.spec import planning_device
from taskgraph.runtime.gpu.virtual import is_virtual

__all__ = ["DeviceArray", "DeviceTensors", "Gpu", "is_virtual", "planning_device"]
