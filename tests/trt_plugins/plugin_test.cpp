// Drives the plugins of a compiled library through TensorRT's interfaces, as a builder and a runtime would, without them.
// Usage: plugin_test LIBRARY
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <list>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

using namespace nvinfer1;

namespace {

int failures = 0;

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      ++failures;                                                              \
      std::printf("FAIL %s:%d %s\n", __FILE__, __LINE__, #condition);          \
    }                                                                          \
  } while (false)

class Logger final : public ILogger {
 public:
  std::string said;
  void log(Severity, AsciiChar const* text) noexcept override { said = said + text + "\n"; }
  std::string take() { return std::exchange(said, ""); }
};

class Finder final : public ILoggerFinder {
 public:
  Logger logger;
  ILogger* findLogger() override { return &logger; }
};

Finder finder;

bool heard(std::string const& words) {
  std::string const said = finder.logger.take();
  bool const found = said.find(words) != std::string::npos;
  if (!found) std::printf("heard instead of '%s': %s\n", words.c_str(), said.c_str());
  return found;
}

// --- symbolic dimensions: a constant, or a size that is known at run time only

class Expression final : public IDimensionExpr, apiv::VDimensionExpr {
 public:
  explicit Expression(int64_t value) : value_(value) { mImpl = this; }
  bool isConstant() const override { return value_ >= 0; }
  int64_t getConstantValue() const override { return value_ >= 0 ? value_ : std::numeric_limits<int64_t>::min(); }
  bool isSizeTensor() const override { return false; }
  using IDimensionExpr::getConstantValue;

 private:
  int64_t value_;
};

class Builder final : public IExprBuilder, apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  IDimensionExpr const* constant(int64_t value) override { return &made_.emplace_back(value); }
  IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override {
    return nullptr;
  }
  IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
    return nullptr;
  }

 private:
  std::list<Expression> made_;
};

// --- ops

using Sizes = std::vector<std::pair<char const*, int32_t>>;
using Shapes = std::vector<std::vector<int64_t>>;  // of the inputs; -1: tokens

struct Op {
  std::string name;
  Sizes fields;
  Shapes inputs;
  std::vector<int> fixed;  // inputs whose type is not that of x
  DataType fixed_type;
};

std::vector<Op> ops() {
  std::vector<Op> found = {
      {"KroneckerLinear", {{"in_features", 64}, {"out_features", 48}, {"terms", 2}, {"blocks", 4}},
       {{-1, 64}, {48, 32}, {2, 4}}, {2}, DataType::kFLOAT},
      {"KroneckerLinearOut", {{"in_features", 64}, {"out_features", 48}, {"terms", 2}, {"blocks", 4}},
       {{-1, 64}, {24, 64}, {2, 4}}, {2}, DataType::kFLOAT},
      {"KroneckerLeadingLinear", {{"in_features", 64}, {"out_features", 48}, {"terms", 3}, {"blocks", 4}},
       {{-1, 64}, {48, 48}}, {}, DataType::kFLOAT},
      {"KroneckerLeadingLinearOut", {{"in_features", 64}, {"out_features", 48}, {"terms", 3}, {"blocks", 4}},
       {{-1, 64}, {36, 64}}, {}, DataType::kFLOAT},
      {"GroupShuffleLinear_2x3",
       {{"in_features", 64}, {"out_features", 48}, {"left_blocks", 2}, {"right_blocks", 3}, {"rank", 8}},
       {{-1, 64}, {2, 24, 32}, {3, 16, 16}}, {}, DataType::kFLOAT},
      {"PivotedLinear", {{"in_features", 64}, {"out_features", 48}, {"rank", 16}},
       {{-1, 64}, {16, 64}, {32, 16}, {48}}, {3}, DataType::kINT32},
      {"PivotedLinearIn", {{"in_features", 64}, {"out_features", 48}, {"rank", 16}},
       {{-1, 64}, {16, 48}, {48, 16}, {64}}, {3}, DataType::kINT32},
  };
  size_t const plain = found.size();
  for (size_t i = 0; i < plain; ++i) {
    Op biased = found[i];
    biased.name += "Bias";
    biased.inputs.push_back({48});
    found.push_back(biased);
  }
  return found;
}

std::vector<IPluginCreatorV3One*> creators;

IPluginCreatorV3One* creator_of(std::string const& name) {
  for (auto* creator : creators)
    if (name == creator->getPluginName()) return creator;
  std::printf("FAIL no creator of %s\n", name.c_str());
  std::exit(1);
}

std::unique_ptr<IPluginV3> create(Op const& op, Sizes const& fields, PluginFieldType type = PluginFieldType::kINT32) {
  std::vector<PluginField> given;
  std::vector<int64_t> wide;
  for (auto const& [name, value] : fields) wide.push_back(value);
  for (size_t i = 0; i < fields.size(); ++i) {
    void const* const data = type == PluginFieldType::kINT64 ? static_cast<void const*>(&wide[i]) : &fields[i].second;
    given.push_back({fields[i].first, data, type, 1});
  }
  PluginFieldCollection const collection{int32_t(given.size()), given.data()};
  return std::unique_ptr<IPluginV3>(creator_of(op.name)->createPlugin("node", &collection, TensorRTPhase::kBUILD));
}

template <typename Capability>
Capability* capability(IPluginV3& plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(plugin.getCapabilityInterface(type));
}

IPluginV3OneBuild* build_of(IPluginV3& plugin) {
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

// Symbolic shapes of the inputs; input `wrong` is one larger in its last dimension.
std::vector<DimsExprs> symbolic(Op const& op, Builder& builder, int wrong = -1) {
  std::vector<DimsExprs> dims;
  for (size_t i = 0; i < op.inputs.size(); ++i) {
    DimsExprs d{};
    d.nbDims = int32_t(op.inputs[i].size());
    for (int32_t j = 0; j < d.nbDims; ++j) {
      d.d[j] = builder.constant(op.inputs[i][j] + (int(i) == wrong && j == d.nbDims - 1));
    }
    dims.push_back(d);
  }
  return dims;
}

PluginTensorDesc tensor(std::vector<int64_t> const& shape, DataType type, int64_t tokens) {
  PluginTensorDesc desc{};
  desc.dims.nbDims = int32_t(shape.size());
  for (size_t j = 0; j < shape.size(); ++j) desc.dims.d[j] = shape[j] < 0 ? tokens : shape[j];
  desc.type = type;
  desc.format = TensorFormat::kLINEAR;
  desc.scale = 1.f;
  return desc;
}

DataType type_of(Op const& op, size_t input, DataType own) {
  for (int const fixed : op.fixed)
    if (size_t(fixed) == input) return op.fixed_type;
  return own;
}

std::vector<PluginTensorDesc> tensors(Op const& op, DataType own, int64_t tokens) {
  std::vector<PluginTensorDesc> found;
  for (size_t i = 0; i < op.inputs.size(); ++i) found.push_back(tensor(op.inputs[i], type_of(op, i, own), tokens));
  found.push_back(tensor({-1, 48}, own, tokens));
  return found;
}

std::vector<DynamicPluginTensorDesc> dynamic(std::vector<PluginTensorDesc> const& found, int64_t most) {
  std::vector<DynamicPluginTensorDesc> made;
  for (auto const& desc : found) {
    DynamicPluginTensorDesc d{};
    d.desc = desc;
    d.min = d.opt = d.max = desc.dims;
    if (desc.dims.d[0] < 0) d.min.d[0] = 1, d.opt.d[0] = 1, d.max.d[0] = most;
    made.push_back(d);
  }
  return made;
}

void shapes(Op const& op) {
  auto const plugin = create(op, op.fields);
  IPluginV3OneBuild* const build = build_of(*plugin);
  int32_t const inputs = int32_t(op.inputs.size());
  CHECK(build->getNbOutputs() == 1);
  for (DataType const own : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    std::vector<DataType> types;
    for (size_t i = 0; i < op.inputs.size(); ++i) types.push_back(type_of(op, i, own));
    DataType made{};
    CHECK(build->getOutputDataTypes(&made, 1, types.data(), inputs) == 0 && made == own);
    CHECK(build->getOutputDataTypes(&made, 1, types.data(), inputs - 1) != 0);
    CHECK(heard("inputs and makes 1 output"));
  }
  Builder builder;
  DimsExprs out{};
  auto good = symbolic(op, builder);
  CHECK(build->getOutputShapes(good.data(), inputs, nullptr, 0, &out, 1, builder) == 0);
  CHECK(out.nbDims == 2 && out.d[0] == good[0].d[0] && out.d[1]->isConstant() && out.d[1]->getConstantValue() == 48);
  for (int wrong = 0; wrong < inputs; ++wrong) {
    auto bad = symbolic(op, builder, wrong);
    CHECK(build->getOutputShapes(bad.data(), inputs, nullptr, 0, &out, 1, builder) != 0);
    CHECK(heard("input " + std::to_string(wrong) + " must have the shape"));
  }
  good[0].nbDims = 3;
  good[0].d[2] = good[0].d[1];
  CHECK(build->getOutputShapes(good.data(), inputs, nullptr, 0, &out, 1, builder) != 0);
  CHECK(heard("input 0 must have the shape (any, 64)"));
}

void formats(Op const& op) {
  auto const plugin = create(op, op.fields);
  IPluginV3OneBuild* const build = build_of(*plugin);
  int32_t const inputs = int32_t(op.inputs.size());
  auto const accepts = [&](std::vector<PluginTensorDesc> const& found, int32_t position) {
    auto all = dynamic(found, 64);
    return build->supportsFormatCombination(position, all.data(), inputs, 1);
  };
  for (DataType const own : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    auto const good = tensors(op, own, -1);
    for (int32_t i = 0; i <= inputs; ++i) {
      CHECK(accepts(good, i));
      auto other = good;
      other[i].format = TensorFormat::kCHW4;
      CHECK(!accepts(other, i));
      other = good;
      other[i].type = DataType::kINT8;
      CHECK(!accepts(other, i));
      other[i].type = own == DataType::kHALF ? DataType::kBF16 : DataType::kHALF;
      CHECK(i == 0 || !accepts(other, i));  // all as x, but for factors whose type is fixed
    }
  }
  auto all = dynamic(tensors(op, DataType::kHALF, -1), 64);
  CHECK(!build->supportsFormatCombination(0, all.data(), inputs + 1, 1));
}

void configuration(Op const& op) {
  auto const plugin = create(op, op.fields);
  IPluginV3OneBuild* const build = build_of(*plugin);
  auto* const runtime = capability<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME);
  int32_t const inputs = int32_t(op.inputs.size());
  auto const found = tensors(op, DataType::kHALF, -1);
  auto all = dynamic(found, 4096);
  CHECK(build->configurePlugin(all.data(), inputs, all.data() + inputs, 1) == 0);
  size_t const most = build->getWorkspaceSize(all.data(), inputs, all.data() + inputs, 1);
  auto few = dynamic(found, 4);
  size_t const less = build->getWorkspaceSize(few.data(), inputs, few.data() + inputs, 1);
  CHECK(less < most && most < (size_t(1) << 30));
  all[1].desc.dims.d[0] += 1;
  CHECK(build->configurePlugin(all.data(), inputs, all.data() + inputs, 1) != 0);
  CHECK(heard("input 1 must have the shape"));
  auto concrete = tensors(op, DataType::kHALF, 5);
  CHECK(runtime->onShapeChange(concrete.data(), inputs, concrete.data() + inputs, 1) == 0);
  concrete[0].dims.d[1] = 63;
  CHECK(runtime->onShapeChange(concrete.data(), inputs, concrete.data() + inputs, 1) != 0);
  CHECK(heard("input 0 must have the shape (any, 64)"));
  CHECK(runtime->onShapeChange(concrete.data(), inputs - 1, concrete.data() + inputs, 1) != 0);
  CHECK(heard("inputs and makes 1 output"));
}

// What an engine stores of a plugin makes the same plugin again, and so does a clone.
void round_trip(Op const& op) {
  auto const plugin = create(op, op.fields);
  auto* const core = capability<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE);
  CHECK(op.name == core->getPluginName());
  CHECK(std::string(core->getPluginNamespace()) == "procrustes" && std::string(core->getPluginVersion()) == "1");
  auto* const runtime = capability<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME);
  PluginFieldCollection const* const stored = runtime->getFieldsToSerialize();
  CHECK(stored->nbFields == int32_t(op.fields.size()));
  for (int32_t i = 0; i < stored->nbFields; ++i) {
    bool known = false;
    for (auto const& [name, value] : op.fields) {
      known = known || (std::strcmp(name, stored->fields[i].name) == 0 && stored->fields[i].length == 1 &&
                        *static_cast<int32_t const*>(stored->fields[i].data) == value);
    }
    CHECK(known);
  }
  std::unique_ptr<IPluginV3> const again(creator_of(op.name)->createPlugin("node", stored, TensorRTPhase::kRUNTIME));
  CHECK(again != nullptr);
  std::unique_ptr<IPluginV3> const cloned(again->clone());
  Builder builder;
  DimsExprs out{};
  auto dims = symbolic(op, builder);
  for (IPluginV3* const one : {again.get(), cloned.get()}) {
    CHECK(build_of(*one)->getOutputShapes(dims.data(), int32_t(dims.size()), nullptr, 0, &out, 1, builder) == 0);
  }
  std::unique_ptr<IPluginV3> const attached(runtime->attachToContext(nullptr));
  CHECK(attached != nullptr && attached.get() != plugin.get());
  CHECK(create(op, op.fields, PluginFieldType::kINT64) != nullptr);  // as ONNX parsers before 10.7 gave them
}

void bad_fields(Op const& op) {
  for (size_t i = 0; i < op.fields.size(); ++i) {
    auto fields = op.fields;
    std::string const name = fields[i].first;
    fields[i].second = 0;
    CHECK(create(op, fields) == nullptr && heard("the attribute " + name + " is 0"));
    fields[i].second = -3;
    CHECK(create(op, fields) == nullptr && heard("the attribute " + name + " is -3"));
    fields.erase(fields.begin() + int64_t(i));
    CHECK(create(op, fields) == nullptr && heard("needs the attribute " + name));
  }
  CHECK(create(op, op.fields, PluginFieldType::kFLOAT32) == nullptr && heard("must be one integer"));
  auto fields = op.fields;
  fields.push_back({"plugin_version_of_tomorrow", 7});  // what is not known is not read
  CHECK(create(op, fields) != nullptr);
}

// There is no GPU: what is enqueued has to fail, with a message, and not to end the process.
void enqueue_without_a_device(Op const& op) {
  auto const plugin = create(op, op.fields);
  auto* const runtime = capability<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME);
  int32_t const inputs = int32_t(op.inputs.size());
  std::vector<char> memory(1 << 20);
  std::vector<void const*> in(inputs, memory.data());
  void* out = memory.data();
  for (int64_t const tokens : {1, 5, 40}) {
    auto concrete = tensors(op, DataType::kHALF, tokens);
    CHECK(runtime->enqueue(concrete.data(), concrete.data() + inputs, in.data(), &out, memory.data(), nullptr) != 0);
    CHECK(heard("CUDA error"));
  }
  auto nothing = tensors(op, DataType::kHALF, 0);
  CHECK(runtime->enqueue(nothing.data(), nothing.data() + inputs, in.data(), &out, memory.data(), nullptr) == 0);
}

}  // namespace

int main(int count, char** arguments) {
  void* const library = dlopen(count > 1 ? arguments[1] : "", RTLD_NOW);
  if (library == nullptr) {
    std::printf("FAIL %s\n", dlerror());
    return 1;
  }
  auto const get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  auto const set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  CHECK(get != nullptr && set != nullptr);
  set(&finder);
  int32_t known = 0;
  auto* const* const found = get(known);
  std::set<std::string> names;
  for (int32_t i = 0; i < known; ++i) {
    creators.push_back(static_cast<IPluginCreatorV3One*>(found[i]));
    names.insert(creators.back()->getPluginName());
    CHECK(std::string(creators.back()->getPluginNamespace()) == "procrustes");
    CHECK(creators.back()->getFieldNames()->nbFields >= 3);
  }
  CHECK(int32_t(names.size()) == known && known > 100);
  for (Op const& op : ops()) {
    shapes(op);
    formats(op);
    configuration(op);
    round_trip(op);
    bad_fields(op);
    enqueue_without_a_device(op);
  }
  std::printf("%zu ops, %d failures\n", ops().size(), failures);
  return failures != 0;
}
