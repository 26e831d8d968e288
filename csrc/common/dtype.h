// Element types that the Python side names by number.
#pragma once

namespace kolors_fast {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

inline bool is_dtype(int code) { return code >= 0 && code <= 2; }

} // namespace kolors_fast
