// The TensorRT plugins of domain `procrustes`: one class for every op of the table (ops/table.cu), one creator for each
// op_type. The library links neither libnvinfer nor libcuda; TensorRT finds the creators through `getCreators`.
#include "cublas.h"
#include "../ops/op.h"

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

// An op_type: an op of the table, with the grid of the name where it has one, with a bias or without.
struct OpType {
  std::string name;
  Op const* op;
  Sizes grid;  // `left` and `right`, 0 where the name has none
  bool bias;

  // x, the factors, and the bias where there is one.
  int inputs() const { return 1 + int(op->inputs.size()) + bias; }

  // Sizes that the node must give.
  std::vector<char const*> fields() const {
    std::vector<char const*> all = {"in_features", "out_features"};
    all.insert(all.end(), op->fields.begin(), op->fields.end());
    return all;
  }
};

int32_t* place(Sizes& sizes, std::string const& field) {
  static std::map<std::string, int32_t Sizes::*> const fields = {
      {"in_features", &Sizes::in}, {"out_features", &Sizes::out}, {"terms", &Sizes::terms},
      {"blocks", &Sizes::blocks},  {"left_blocks", &Sizes::left}, {"right_blocks", &Sizes::right},
      {"rank", &Sizes::rank}};
  return &(sizes.*fields.at(field));
}

// Why these sizes are none of this op_type, or an empty string.
std::string wrong(OpType const& type, Sizes const& sizes) {
  if (type.op->grids && (sizes.left != type.grid.left || sizes.right != type.grid.right)) {
    return "the grid is not that of the name";
  }
  if (sizes.in < 1 || sizes.out < 1) {
    return "in_features " + std::to_string(sizes.in) + " and out_features " + std::to_string(sizes.out);
  }
  return type.op->check(sizes);
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
 public:
  Plugin(OpType const& type, Sizes const& sizes) : type_(type), sizes_(sizes) {}

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
      return new Plugin(type_, sizes_);
    } catch (std::exception const& error) {
      report("%s: %s", type_.name.c_str(), error.what());
      return nullptr;
    }
  }

  // --- core

  AsciiChar const* getPluginName() const noexcept override { return type_.name.c_str(); }
  AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

  // --- build

  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(DataType* types, int32_t outputs, DataType const* inputs,
                             int32_t count) const noexcept override {
    if (outputs != 1 || count != type_.inputs()) return refuse_counts(count, outputs);
    types[0] = inputs[0];
    return 0;
  }

  int32_t getOutputShapes(DimsExprs const* inputs, int32_t count, DimsExprs const*, int32_t, DimsExprs* outputs,
                          int32_t made, IExprBuilder& builder) noexcept override {
    if (made != 1 || count != type_.inputs()) return refuse_counts(count, made);
    auto const known = [](IDimensionExpr const* d) { return d->isConstant() ? d->getConstantValue() : kAny; };
    for (int32_t i = 0; i < count; ++i) {
      if (int32_t const code = check(i, inputs[i].nbDims, [&](int32_t d) { return known(inputs[i].d[d]); })) return code;
    }
    outputs[0].nbDims = 2;
    outputs[0].d[0] = inputs[0].d[0];
    outputs[0].d[1] = builder.constant(sizes_.out);
    return 0;
  }

  bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    if (inputs != type_.inputs() || outputs != 1) return false;
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
    int64_t bytes = type_.op->workspace(sizes_, type, int32_t(most));
    for (int32_t tokens = 1; tokens < most && tokens <= kTokensChecked; ++tokens) {
      int64_t const needed = type_.op->workspace(sizes_, type, tokens);
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
    void const* const bias = type_.bias ? in[type_.inputs() - 1] : nullptr;
    int32_t const error = type_.op->run(sizes_, own_type(inputs[0].type), int32_t(tokens), in[0], in + 1, bias, out[0],
                                        workspace, with_cublas(), stream);
    if (error != 0) report("%s: CUDA error %d", type_.name.c_str(), error);
    return error;
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    fields_.clear();
    for (char const* const name : type_.fields()) {
      fields_.push_back({name, place(sizes_, name), PluginFieldType::kINT32, 1});
    }
    collection_ = {int32_t(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  static constexpr int64_t kAny = -1;

  // Dimensions of input i; kAny: of any size.
  std::vector<int64_t> shape_of(int32_t i) const {
    if (i == 0) return {kAny, sizes_.in};
    if (type_.bias && i == type_.inputs() - 1) return {sizes_.out};
    return type_.op->shapes(sizes_)[i - 1];
  }

  DataType type_of(int32_t position, DataType own) const {
    if (position == 0 || position > int32_t(type_.op->inputs.size())) return own;  // x, the bias, y
    switch (type_.op->inputs[position - 1].type) {
      case InputType::kOwn: return own;
      case InputType::kFloat: return DataType::kFLOAT;
      case InputType::kInt32: return DataType::kINT32;
    }
    return own;
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
    if (outputs != 1 || inputs != type_.inputs()) return refuse_counts(inputs, outputs);
    for (int32_t i = 0; i < inputs; ++i) {
      Dims const& dims = dims_of(i);
      if (int32_t const code = check(i, dims.nbDims, [&](int32_t d) { return int64_t(dims.d[d]); })) return code;
    }
    return 0;
  }

  int32_t refuse_counts(int32_t inputs, int32_t outputs) const {
    report("%s takes %d inputs and makes 1 output, not %d and %d", type_.name.c_str(), type_.inputs(), inputs, outputs);
    return -1;
  }

  int32_t refuse_shape(int32_t i, std::vector<int64_t> const& expected) const {
    std::string text;
    for (int64_t const size : expected) text += (text.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
    report("%s: input %d must have the shape (%s) by the node's attributes", type_.name.c_str(), i, text.c_str());
    return -1;
  }

  OpType type_;
  Sizes sizes_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

class Creator final : public IPluginCreatorV3One {
 public:
  explicit Creator(OpType type) : type_(std::move(type)) {
    for (char const* const name : type_.fields()) fields_.push_back({name, nullptr, PluginFieldType::kINT32, 1});
    collection_ = {int32_t(fields_.size()), fields_.data()};
  }

  AsciiChar const* getPluginName() const noexcept override { return type_.name.c_str(); }
  AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }
  PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }

  IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* given, TensorRTPhase) noexcept override {
    try {
      Sizes sizes{};
      for (char const* const name : type_.fields()) {
        PluginField const* const field = find(given, name);
        if (field == nullptr) {
          report("%s needs the attribute %s", type_.name.c_str(), name);
          return nullptr;
        }
        int64_t value = 0;
        if (field->length == 1 && field->type == PluginFieldType::kINT32) {
          value = *static_cast<int32_t const*>(field->data);
        } else if (field->length == 1 && field->type == PluginFieldType::kINT64) {
          value = *static_cast<int64_t const*>(field->data);
        } else {
          report("%s: the attribute %s must be one integer", type_.name.c_str(), name);
          return nullptr;
        }
        if (value < 1 || value > INT32_MAX) {
          report("%s: the attribute %s is %lld", type_.name.c_str(), name, static_cast<long long>(value));
          return nullptr;
        }
        *place(sizes, name) = int32_t(value);
      }
      std::string const reason = wrong(type_, sizes);
      if (!reason.empty()) {
        report("%s: %s", type_.name.c_str(), reason.c_str());
        return nullptr;
      }
      return new Plugin(type_, sizes);
    } catch (std::exception const& error) {
      report("%s: %s", type_.name.c_str(), error.what());
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

  OpType type_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

std::vector<OpType> op_types() {
  std::vector<OpType> found;
  auto const add = [&](std::string const& name, Op const& op, Sizes const& grid) {
    for (bool const bias : {false, true}) found.push_back({name + (bias ? "Bias" : ""), &op, grid, bias});
  };
  for (Op const& op : ops()) {
    if (!op.grids) add(op.name, op, {});
    for (int32_t left = 1; op.grids && left <= kGrid; ++left) {
      for (int32_t right = 1; right <= kGrid; ++right) {
        Sizes grid{};
        grid.left = left, grid.right = right;
        add(op.name + std::to_string(left) + "x" + std::to_string(right), op, grid);
      }
    }
  }
  return found;
}

std::vector<std::unique_ptr<Creator>> creators() {
  std::vector<std::unique_ptr<Creator>> found;
  for (OpType const& type : op_types()) found.push_back(std::make_unique<Creator>(type));
  return found;
}

// {"name": ..., "version": ..., "namespace": ..., "inputs": [[name, type], ...], "attributes": [...]}; types are "own",
// that of x, "float32" and "int32".
std::string described(OpType const& type) {
  auto const quoted = [](std::string const& text) { return "\"" + text + "\""; };
  std::string inputs = "[\"x\", \"own\"]", attributes;
  for (Input const& input : type.op->inputs) {
    char const* const its = input.type == InputType::kFloat ? "float32" : input.type == InputType::kInt32 ? "int32" : "own";
    inputs += ", [" + quoted(input.name) + ", " + quoted(its) + "]";
  }
  if (type.bias) inputs += ", [\"bias\", \"own\"]";
  for (char const* const field : type.fields()) attributes += (attributes.empty() ? "" : ", ") + quoted(field);
  return "{\"name\": " + quoted(type.name) + ", \"version\": " + quoted(kVersion) + ", \"namespace\": " +
         quoted(kNamespace) + ", \"inputs\": [" + inputs + "], \"attributes\": [" + attributes + "]}";
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

// Every op_type that the library has a creator of, as a JSON list; see `described`.
extern "C" __attribute__((visibility("default"))) char const* describeOps() {
  static std::string const text = [] {
    std::string all;
    for (auto const& type : procrustes::op_types()) all += (all.empty() ? "" : ", ") + procrustes::described(type);
    return "[" + all + "]";
  }();
  return text.c_str();
}
