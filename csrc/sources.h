// Which sources this was built from.
#pragma once

namespace engine {

// SHA-256 in hexadecimal of lines "name hash\n", one for each .h, .cpp and .cu of csrc/, by name.
const char* sources();

}  // namespace engine
