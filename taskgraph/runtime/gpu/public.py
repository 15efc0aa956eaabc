"""`tg.gpu`: how kinds of ops run on a GPU, open to other packages, and what a program needs that keeps tensors on one,
real or virtual, and captures several plans over them."""

from taskgraph.runtime.gpu.arrays import DeviceArray, DeviceTensors
from taskgraph.runtime.gpu.driver import Gpu
from taskgraph.runtime.gpu.kinds import Buffer, CopyLaunch, GpuSite, Launch, blocks, float_type, register, spread
from taskgraph.runtime.gpu.pipeline import Pipeline
from taskgraph.runtime.gpu.shared import SharedMemory
from taskgraph.runtime.gpu.spec import planning_device
from taskgraph.runtime.gpu.standard import GPU_KINDS
from taskgraph.runtime.gpu.virtual import is_virtual
