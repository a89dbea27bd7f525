// What is read ahead for the next layer while this one is computed. See read_ahead.cpp.
#pragma once

#include "expert_rows.h"
#include "expert_store.h"

namespace edgellm {

// Observes what `layer` uses in this step, and reads ahead for the next layer what is foreseen; keeps the log. By the
// first thread of the layer's first multiplication, `op`, after `gather`.
void read_ahead(const ggml::Tensor * op, int layer, ExpertStore & store, Plan & plan);

}  // namespace edgellm
