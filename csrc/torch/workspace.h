// Memory that kernels need for a while, kept for the next call: pages that the system has to clear first cost as much
// as filling them.
#pragma once

#include "tensor.h"

namespace pyflow {

// bytes of memory not in use that are kept
constexpr int64_t kMostKept = int64_t(1) << 28;

// memory at a multiple of 64 bytes
char* take_memory(int64_t bytes);
void give_memory(void* memory);

// memory of a scope
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : data(take_memory(bytes)) {}
  ~Workspace() { give_memory(data); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* const data;
};

// a tensor (rows, columns) whose memory goes back with it
Tensor new_workspace(const Tensor& like, int64_t rows, int64_t columns);

}  // namespace pyflow
