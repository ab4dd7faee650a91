#include "sources.h"

namespace engine {

const char* sources() { return ENGINE_SOURCES; }

}  // namespace engine
