// In which order the threads of a block take turns on the host, for the tests.
#include "cuda_on_host.h"

extern "C" void set_order(int order) { cuda_on_host::order = static_cast<cuda_on_host::Order>(order); }
