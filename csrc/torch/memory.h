// Memory that kernels need for a while, kept for the next call: pages that the system has to clear first cost as much
// as filling them.
#pragma once

#include "device.h"

namespace pyflow {

// most bytes of memory that is not in use
constexpr int64_t kMostUnused = int64_t(1) << 28;

// memory at a multiple of 64 bytes
char* take_memory(int64_t bytes);
void give_memory(void* memory);

// memory of a scope
class Memory {
 public:
  explicit Memory(int64_t bytes) : data(take_memory(bytes)) {}
  ~Memory() { give_memory(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* const data;
};

// a tensor (rows, columns) of float64 or float32 on the CPU, whose memory goes back with it
Tensor new_reused(const Tensor& like, int64_t rows, int64_t columns, bool f64);

}  // namespace pyflow
