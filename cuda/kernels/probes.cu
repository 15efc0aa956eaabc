// Calibration probes: what bandwidth the SMs of a partition draw, arithmetic that keeps them busy for a set time, and
// nothing.
#include "common.cuh"

extern "C" __global__ void empty() { follow(); }
EXPORT(empty)

using Index = long long;

struct alignas(16) Floats4 {
    float part[4];
};

// Reads `units` times 16 bytes `rounds` times; the sum goes out, so that no read is left out.
extern "C" __global__ void bandwidth_probe(const Floats4* data, float* out, long long units, int rounds) {
    follow();
    float sum = 0.0f;
    Index stride = static_cast<Index>(gridDim.x) * blockDim.x;
    for (int round = 0; round < rounds; round++)
        for (Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; i < units; i += stride)
            for (int part = 0; part < 4; part++) sum += data[i].part[part];
    out[static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x] = sum;
}
EXPORT(bandwidth_probe)

constexpr int CHAINS = 8, STEPS = 64;  // independent chains hide the latency of an FMA

// Multiplies and adds for `cycles` ticks of the SM's clock; `steps` gets how many FMAs each thread did.
extern "C" __global__ void fma_probe(float* out, long long* steps, long long cycles) {
    follow();
    float value[CHAINS];
    for (int c = 0; c < CHAINS; c++) value[c] = static_cast<float>(threadIdx.x + c);
    long long begin = clock64(), done = 0;
    do {
        for (int step = 0; step < STEPS; step++)
            for (int c = 0; c < CHAINS; c++) value[c] = fmaf(value[c], 0.999f, 0.5f);
        done += STEPS * CHAINS;
    } while (clock64() - begin < cycles);
    float sum = 0.0f;
    for (int c = 0; c < CHAINS; c++) sum += value[c];
    Index at = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    out[at] = sum;
    steps[at] = done;
}
EXPORT(fma_probe)
