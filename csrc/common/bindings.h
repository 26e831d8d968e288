// How a pointer travels through Python: as an integer, 0 for an absent one.
#pragma once

#include <cstdint>
#include <type_traits>

namespace kolors_fast {

template <typename T> using Argument = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;

template <typename T> T from_argument(Argument<T> value) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(value);
    } else {
        return value;
    }
}

} // namespace kolors_fast
