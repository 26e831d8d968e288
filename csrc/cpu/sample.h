// A glance at memory: cheap enough for every call, and different after nearly any edit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kolors_fast {

// Hash of 64 words of 4 bytes, evenly spread over `bytes` bytes at `data`, the first and the last among them.
uint64_t sample(const void *data, size_t bytes);

} // namespace kolors_fast
