// The TensorRT plugins of domain `procrustes`: one class for every op of the contract (export/graph/ops.py), one creator for each
// op_type. The library links neither libnvinfer nor libcuda; TensorRT finds the creators through `getCreators`.
#include "cublas.h"
#include "linear.h"

#include <NvInferRuntime.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace procrustes {
namespace {

using namespace nvinfer1;

constexpr char const* kNamespace = "procrustes";
constexpr char const* kVersion = "1";
constexpr int kGrid = 8;               // GroupShuffleLinear_{l}x{r} up to this; beyond, TensorRT takes the op's body
constexpr int kTokensChecked = 4096;   // beyond, more tokens never need less workspace

ILoggerFinder* finder = nullptr;

__attribute__((format(printf, 1, 2))) void report(char const* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
  if (logger != nullptr) {
    logger->log(ILogger::Severity::kERROR, text);
  } else {
    std::fprintf(stderr, "[procrustes] %s\n", text);
  }
}

bool with_cublas() {
  return cublas_available([](char const* reason) {
    report("prefill will be slow, its products run without cuBLAS: %s (pip install nvidia-cublas, or the CUDA runtime)",
           reason);
  });
}

// An op_type, without sizes.
struct Op {
  std::string name;
  Linear linear;  // `kind`, `leading`, and the grid of GroupShuffleLinear
  bool bias;
  std::vector<char const*> fields;  // sizes that the node must give

  // x, the factors, and the bias where there is one.
  int inputs() const {
    int const factors = linear.kind == Kind::kPivoted || linear.kind == Kind::kPivotedIn ? 3
                        : linear.leading                                                ? 1
                                                                                         : 2;
    return 1 + factors + bias;
  }
};

int32_t* place(Linear& linear, std::string const& field) {
  static std::map<std::string, int32_t Linear::*> const fields = {
      {"in_features", &Linear::in}, {"out_features", &Linear::out}, {"terms", &Linear::terms},
      {"blocks", &Linear::blocks},  {"left_blocks", &Linear::left}, {"right_blocks", &Linear::right},
      {"rank", &Linear::rank}};
  auto const found = fields.find(field);
  return found == fields.end() ? nullptr : &(linear.*found->second);
}

// Why these sizes are none, or an empty string.
std::string wrong(Linear const& l) {
  auto const number = [](int32_t value) { return std::to_string(value); };
  if (l.in < 1 || l.out < 1) return "in_features " + number(l.in) + " and out_features " + number(l.out);
  switch (l.kind) {
    case Kind::kKroneckerIn:
    case Kind::kKroneckerOut: {
      int32_t const whole = l.kind == Kind::kKroneckerIn ? l.in : l.out;
      if (l.blocks < 1 || whole % l.blocks != 0) return number(l.blocks) + " blocks do not divide " + number(whole);
      if (l.terms < 1 || (l.leading && l.terms > l.blocks)) return number(l.terms) + " terms of " + number(l.blocks);
      return "";
    }
    case Kind::kGroupShuffle:
      if (l.left < 1 || l.in % l.left != 0) return number(l.left) + " left blocks do not divide " + number(l.in);
      if (l.right < 1 || l.out % l.right != 0) return number(l.right) + " right blocks do not divide " + number(l.out);
      return l.rank < 1 ? "rank " + number(l.rank) : "";
    case Kind::kPivoted: return l.rank < 1 || l.rank >= l.out ? "rank " + number(l.rank) + " of out_features" : "";
    case Kind::kPivotedIn: return l.rank < 1 || l.rank >= l.in ? "rank " + number(l.rank) + " of in_features" : "";
  }
  return "an unknown kind";
}

// Shapes of the factors, in the order of the inputs; of `order` and A as well.
std::vector<std::vector<int64_t>> factor_shapes(Linear const& l) {
  int64_t const in = l.in, out = l.out, rank = l.rank;
  switch (l.kind) {
    case Kind::kKroneckerIn:
    case Kind::kKroneckerOut: {
      bool const reads = l.kind == Kind::kKroneckerIn;
      int64_t const kept = int64_t(l.terms) * ((reads ? in : out) / l.blocks);
      std::vector<std::vector<int64_t>> shapes = {reads ? std::vector{out, kept} : std::vector{kept, in}};
      if (!l.leading) shapes.push_back({l.terms, l.blocks});
      return shapes;
    }
    case Kind::kGroupShuffle:
      return {{l.left, l.right * rank, in / l.left}, {l.right, out / l.right, l.left * rank}};
    case Kind::kPivoted: return {{rank, in}, {out - rank, rank}, {out}};
    case Kind::kPivotedIn: return {{rank, in - rank}, {out, rank}, {in}};
  }
  return {};
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
 public:
  Plugin(Op const& op, Linear const& linear) : op_(op), linear_(linear) {}

  // --- IPluginV3

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  IPluginV3* clone() noexcept override {
    try {
      return new Plugin(op_, linear_);
    } catch (std::exception const& error) {
      report("%s: %s", op_.name.c_str(), error.what());
      return nullptr;
    }
  }

  // --- core

  AsciiChar const* getPluginName() const noexcept override { return op_.name.c_str(); }
  AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

  // --- build

  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(DataType* types, int32_t outputs, DataType const* inputs,
                             int32_t count) const noexcept override {
    if (outputs != 1 || count != op_.inputs()) return refuse_counts(count, outputs);
    types[0] = inputs[0];
    return 0;
  }

  int32_t getOutputShapes(DimsExprs const* inputs, int32_t count, DimsExprs const*, int32_t, DimsExprs* outputs,
                          int32_t made, IExprBuilder& builder) noexcept override {
    if (made != 1 || count != op_.inputs()) return refuse_counts(count, made);
    auto const known = [](IDimensionExpr const* d) { return d->isConstant() ? d->getConstantValue() : kAny; };
    for (int32_t i = 0; i < count; ++i) {
      if (int32_t const code = check(i, inputs[i].nbDims, [&](int32_t d) { return known(inputs[i].d[d]); })) return code;
    }
    outputs[0].nbDims = 2;
    outputs[0].d[0] = inputs[0].d[0];
    outputs[0].d[1] = builder.constant(linear_.out);
    return 0;
  }

  bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    if (inputs != op_.inputs() || outputs != 1) return false;
    PluginTensorDesc const& tensor = tensors[position].desc;
    if (tensor.format != TensorFormat::kLINEAR) return false;
    if (position == 0) {
      return tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF || tensor.type == DataType::kBF16;
    }
    return tensor.type == type_of(position, tensors[0].desc.type);
  }

  int32_t configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t count, DynamicPluginTensorDesc const*,
                          int32_t outputs) noexcept override {
    return check_all(count, outputs, [&](int32_t i) -> Dims const& { return inputs[i].desc.dims; });
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t, DynamicPluginTensorDesc const*,
                          int32_t) const noexcept override {
    int64_t const most = inputs[0].max.d[0];
    Type const type = own_type(inputs[0].desc.type);
    int64_t bytes = workspace_bytes(linear_, type, int32_t(most));
    for (int32_t tokens = 1; tokens < most && tokens <= kTokensChecked; ++tokens) {
      int64_t const needed = workspace_bytes(linear_, type, tokens);
      bytes = needed > bytes ? needed : bytes;
    }
    return size_t(bytes);
  }

  // --- runtime

  int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t count, PluginTensorDesc const*,
                        int32_t outputs) noexcept override {
    return check_all(count, outputs, [&](int32_t i) -> Dims const& { return inputs[i].dims; });
  }

  int32_t enqueue(PluginTensorDesc const* inputs, PluginTensorDesc const*, void const* const* in, void* const* out,
                  void* workspace, cudaStream_t stream) noexcept override {
    int64_t const tokens = inputs[0].dims.d[0];
    if (tokens == 0) return 0;
    void const* const bias = op_.bias ? in[op_.inputs() - 1] : nullptr;
    int32_t const error = run(linear_, own_type(inputs[0].type), int32_t(tokens), in[0], in + 1, bias, out[0],
                              workspace, with_cublas(), stream);
    if (error != 0) report("%s: CUDA error %d", op_.name.c_str(), error);
    return error;
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    fields_.clear();
    for (char const* const name : op_.fields) fields_.push_back({name, place(linear_, name), PluginFieldType::kINT32, 1});
    collection_ = {int32_t(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  static constexpr int64_t kAny = -1;

  // Dimensions of input i; kAny: of any size.
  std::vector<int64_t> shape_of(int32_t i) const {
    if (i == 0) return {kAny, linear_.in};
    if (op_.bias && i == op_.inputs() - 1) return {linear_.out};
    return factor_shapes(linear_)[i - 1];
  }

  DataType type_of(int32_t position, DataType own) const {
    bool const kronecker = linear_.kind == Kind::kKroneckerIn || linear_.kind == Kind::kKroneckerOut;
    if (kronecker && !linear_.leading && position == 2) return DataType::kFLOAT;  // A
    bool const pivoted = linear_.kind == Kind::kPivoted || linear_.kind == Kind::kPivotedIn;
    return pivoted && position == 3 ? DataType::kINT32 : own;  // order
  }

  static Type own_type(DataType type) {
    return type == DataType::kFLOAT ? Type::kFloat : type == DataType::kHALF ? Type::kHalf : Type::kBfloat16;
  }

  // `size_of(d)`: dimension d of input i, kAny where it is not known yet.
  template <typename SizeOf>
  int32_t check(int32_t i, int32_t dimensions, SizeOf const& size_of) const {
    std::vector<int64_t> const expected = shape_of(i);
    bool good = dimensions == int32_t(expected.size());
    for (int32_t d = 0; good && d < dimensions; ++d) {
      int64_t const found = size_of(d);
      good = expected[d] == kAny || found == kAny || found == expected[d];
    }
    return good ? 0 : refuse_shape(i, expected);
  }

  template <typename DimsOf>
  int32_t check_all(int32_t inputs, int32_t outputs, DimsOf const& dims_of) const {
    if (outputs != 1 || inputs != op_.inputs()) return refuse_counts(inputs, outputs);
    for (int32_t i = 0; i < inputs; ++i) {
      Dims const& dims = dims_of(i);
      if (int32_t const code = check(i, dims.nbDims, [&](int32_t d) { return int64_t(dims.d[d]); })) return code;
    }
    return 0;
  }

  int32_t refuse_counts(int32_t inputs, int32_t outputs) const {
    report("%s takes %d inputs and makes 1 output, not %d and %d", op_.name.c_str(), op_.inputs(), inputs, outputs);
    return -1;
  }

  int32_t refuse_shape(int32_t i, std::vector<int64_t> const& expected) const {
    std::string text;
    for (int64_t const size : expected) text += (text.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
    report("%s: input %d must have the shape (%s) by the node's attributes", op_.name.c_str(), i, text.c_str());
    return -1;
  }

  Op op_;
  Linear linear_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

class Creator final : public IPluginCreatorV3One {
 public:
  explicit Creator(Op op) : op_(std::move(op)) {
    for (char const* const name : op_.fields) fields_.push_back({name, nullptr, PluginFieldType::kINT32, 1});
    collection_ = {int32_t(fields_.size()), fields_.data()};
  }

  AsciiChar const* getPluginName() const noexcept override { return op_.name.c_str(); }
  AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }
  PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }

  IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* given, TensorRTPhase) noexcept override {
    try {
      Linear linear = op_.linear;
      for (char const* const name : op_.fields) {
        PluginField const* const field = find(given, name);
        if (field == nullptr) {
          report("%s needs the attribute %s", op_.name.c_str(), name);
          return nullptr;
        }
        int64_t value = 0;
        if (field->length == 1 && field->type == PluginFieldType::kINT32) {
          value = *static_cast<int32_t const*>(field->data);
        } else if (field->length == 1 && field->type == PluginFieldType::kINT64) {
          value = *static_cast<int64_t const*>(field->data);
        } else {
          report("%s: the attribute %s must be one integer", op_.name.c_str(), name);
          return nullptr;
        }
        if (value < 1 || value > INT32_MAX) {
          report("%s: the attribute %s is %lld", op_.name.c_str(), name, static_cast<long long>(value));
          return nullptr;
        }
        *place(linear, name) = int32_t(value);
      }
      bool const grid = op_.linear.kind != Kind::kGroupShuffle ||
                        (linear.left == op_.linear.left && linear.right == op_.linear.right);
      std::string const reason = grid ? wrong(linear) : "the grid is not that of the name";
      if (!reason.empty()) {
        report("%s: %s", op_.name.c_str(), reason.c_str());
        return nullptr;
      }
      return new Plugin(op_, linear);
    } catch (std::exception const& error) {
      report("%s: %s", op_.name.c_str(), error.what());
      return nullptr;
    }
  }

 private:
  static PluginField const* find(PluginFieldCollection const* given, char const* name) {
    for (int32_t i = 0; i < given->nbFields; ++i) {
      if (std::strcmp(given->fields[i].name, name) == 0 && given->fields[i].data != nullptr) return given->fields + i;
    }
    return nullptr;
  }

  Op op_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

// Every op_type of the contract that has a plugin. KroneckerLinearGeneral and its twin have none: their bodies run.
std::vector<std::unique_ptr<Creator>> creators() {
  std::vector<std::unique_ptr<Creator>> found;
  auto const add = [&](std::string const& name, Linear const& linear, std::vector<char const*> const& sizes) {
    std::vector<char const*> fields = {"in_features", "out_features"};
    fields.insert(fields.end(), sizes.begin(), sizes.end());
    for (bool const bias : {false, true}) {
      found.push_back(std::make_unique<Creator>(Op{name + (bias ? "Bias" : ""), linear, bias, fields}));
    }
  };
  auto const of = [](Kind kind, bool leading = false, int32_t left = 0, int32_t right = 0) {
    Linear linear{};
    linear.kind = kind, linear.leading = leading, linear.left = left, linear.right = right;
    return linear;
  };
  for (bool const leading : {false, true}) {
    std::string const name = leading ? "KroneckerLeadingLinear" : "KroneckerLinear";
    add(name, of(Kind::kKroneckerIn, leading), {"terms", "blocks"});
    add(name + "Out", of(Kind::kKroneckerOut, leading), {"terms", "blocks"});
  }
  add("PivotedLinear", of(Kind::kPivoted), {"rank"});
  add("PivotedLinearIn", of(Kind::kPivotedIn), {"rank"});
  for (int32_t left = 1; left <= kGrid; ++left) {
    for (int32_t right = 1; right <= kGrid; ++right) {
      add("GroupShuffleLinear_" + std::to_string(left) + "x" + std::to_string(right),
          of(Kind::kGroupShuffle, false, left, right), {"left_blocks", "right_blocks", "rank"});
    }
  }
  return found;
}

}  // namespace
}  // namespace procrustes

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static auto const owned = procrustes::creators();
  static auto const pointers = [] {
    std::vector<nvinfer1::IPluginCreatorInterface*> found;
    for (auto const& creator : owned) found.push_back(creator.get());
    return found;
  }();
  count = int32_t(pointers.size());
  return pointers.data();
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* given) {
  procrustes::finder = given;
}
