package control

import (
	"encoding/json"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"gopkg.in/yaml.v3"
)

// decode fills into, a pointer to a struct of the Kubernetes API, from the field
// at p. Every unknown, repeated or wrongly typed field is a problem; it reports
// whether there was none.
func (d *document) decode(p path, n *yaml.Node, into any) bool {
	before := len(d.ps.list)
	d.checkType(p, n, reflect.TypeOf(into).Elem())
	if len(d.ps.list) > before {
		return false
	}
	data, err := toJSON(n)
	if err == nil {
		err = json.Unmarshal(data, into)
	}
	if err != nil {
		d.errorf(p, "%v", err)
	}
	return err == nil
}

// decodeProto is decode for the messages of the Istio API.
func (d *document) decodeProto(p path, n *yaml.Node, into proto.Message) bool {
	before := len(d.ps.list)
	d.checkMessage(p, n, into.ProtoReflect().Descriptor())
	if len(d.ps.list) > before {
		return false
	}
	data, err := toJSON(n)
	if err == nil {
		err = protojson.Unmarshal(data, into)
	}
	if err != nil {
		d.errorf(p, "%v", strings.ReplaceAll(err.Error(), "\u00a0", " "))
	}
	return err == nil
}

// kindOf is a node's kind in words, for messages.
func kindOf(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case isNull(n):
		return "nothing"
	case n.Tag == "!!bool":
		return "a boolean"
	case n.Tag == "!!int", n.Tag == "!!float":
		return "a number"
	}
	return "a string"
}

func (d *document) want(p path, n *yaml.Node, what string) {
	d.errorf(p, "must be %s, is %s", what, kindOf(n))
}

var jsonUnmarshaler = reflect.TypeFor[json.Unmarshaler]()

// checkType compares a tree with the Go type it is meant for.
func (d *document) checkType(p path, n *yaml.Node, t reflect.Type) {
	if isNull(n) {
		return // "absent", as in the Kubernetes API
	}
	if t.Kind() == reflect.Pointer {
		d.checkType(p, n, t.Elem())
		return
	}
	if reflect.PointerTo(t).Implements(jsonUnmarshaler) {
		data, err := toJSON(n)
		if err == nil {
			err = json.Unmarshal(data, reflect.New(t).Interface())
		}
		if err != nil {
			d.errorf(p, "%v", err)
		}
		return
	}
	switch t.Kind() {
	case reflect.Struct:
		d.checkStruct(p, n, t)
	case reflect.Map:
		d.eachEntry(p, n, func(p path, _, v *yaml.Node) { d.checkType(p, v, t.Elem()) })
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			d.checkScalar(p, n, reflect.String)
			return
		}
		d.eachItem(p, n, func(p path, v *yaml.Node) { d.checkType(p, v, t.Elem()) })
	case reflect.Interface:
	default:
		d.checkScalar(p, n, t.Kind())
	}
}

func (d *document) checkStruct(p path, n *yaml.Node, t reflect.Type) {
	fields := jsonFields(t)
	d.eachEntry(p, n, func(p path, key, v *yaml.Node) {
		if ft, ok := fields[key.Value]; ok {
			d.checkType(p, v, ft)
			return
		}
		d.unknownField(p, key.Value, func(yield func(string) bool) {
			for name := range fields {
				if !yield(name) {
					return
				}
			}
		})
	})
}

func (d *document) unknownField(p path, name string, known func(func(string) bool)) {
	for k := range known {
		if strings.EqualFold(k, name) {
			d.errorf(p, "unknown field, it is written %s", k)
			return
		}
	}
	d.errorf(p, "unknown field")
}

// eachEntry calls f for each entry of a mapping, and finds repeated keys.
func (d *document) eachEntry(p path, n *yaml.Node, f func(p path, key, value *yaml.Node)) {
	if n.Kind != yaml.MappingNode {
		d.want(p, n, "a mapping")
		return
	}
	seen := make(map[string]int, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if first, ok := seen[key.Value]; ok {
			d.ps.add(Problem{File: d.file, Line: key.Line, Field: p.of(key.Value).String(),
				Text: "is written a second time; the first is on line " + strconv.Itoa(first)})
			continue
		}
		seen[key.Value] = key.Line
		f(p.of(key.Value), key, value)
	}
}

func (d *document) eachItem(p path, n *yaml.Node, f func(p path, value *yaml.Node)) {
	if n.Kind != yaml.SequenceNode {
		d.want(p, n, "a list")
		return
	}
	for i, c := range n.Content {
		f(p.of(i), c)
	}
}

// checkScalar compares a scalar with a Go kind. The booleans of YAML 1.1 (yes,
// off) are what kubectl takes them for where a boolean is wanted.
func (d *document) checkScalar(p path, n *yaml.Node, k reflect.Kind) {
	if n.Kind != yaml.ScalarNode {
		d.want(p, n, scalarName(k))
		return
	}
	switch k {
	case reflect.String:
		if !isString(n) {
			d.errorf(p, "must be a string, is %s: put %s in quotes", kindOf(n), n.Value)
		}
	case reflect.Bool:
		if n.Tag == "!!str" && n.Style == 0 {
			switch strings.ToLower(n.Value) {
			case "yes", "on", "y":
				n.Tag, n.Value = "!!bool", "true"
			case "no", "off", "n":
				n.Tag, n.Value = "!!bool", "false"
			}
		}
		if n.Tag != "!!bool" {
			d.want(p, n, scalarName(k))
		}
	case reflect.Float32, reflect.Float64:
		if n.Tag != "!!float" && n.Tag != "!!int" {
			d.want(p, n, scalarName(k))
		}
	default:
		if n.Tag != "!!int" {
			d.want(p, n, scalarName(k))
			return
		}
		if err := n.Decode(integerOf(k)); err != nil {
			d.errorf(p, "%s does not fit", n.Value)
		}
	}
}

func scalarName(k reflect.Kind) string {
	switch k {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Float32, reflect.Float64:
		return "a number"
	}
	return "a whole number"
}

func integerOf(k reflect.Kind) any {
	switch k {
	case reflect.Int8:
		return new(int8)
	case reflect.Int16:
		return new(int16)
	case reflect.Int32:
		return new(int32)
	case reflect.Uint8:
		return new(uint8)
	case reflect.Uint16:
		return new(uint16)
	case reflect.Uint32:
		return new(uint32)
	case reflect.Uint, reflect.Uint64:
		return new(uint64)
	}
	return new(int64)
}

var fieldCache sync.Map // reflect.Type -> map[string]reflect.Type

// jsonFields are the fields of a struct by their JSON name, embedded ones included.
func jsonFields(t reflect.Type) map[string]reflect.Type {
	if cached, ok := fieldCache.Load(t); ok {
		return cached.(map[string]reflect.Type)
	}
	fields := make(map[string]reflect.Type)
	for f := range t.Fields() {
		name, opts, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name == "-" || !f.IsExported():
		case f.Anonymous && (name == "" || strings.Contains(opts, "inline")):
			for k, v := range jsonFields(f.Type) {
				fields[k] = v
			}
		case name != "":
			fields[name] = f.Type
		}
	}
	fieldCache.Store(t, fields)
	return fields
}

// checkMessage compares a tree with the protobuf message it is meant for. Both
// spellings of a field are taken, as protojson takes them.
func (d *document) checkMessage(p path, n *yaml.Node, m protoreflect.MessageDescriptor) {
	if isNull(n) || m.FullName().Parent() == "google.protobuf" {
		return // protojson knows the forms of the well-known types
	}
	given := make(map[protoreflect.FieldNumber]bool)
	d.eachEntry(p, n, func(p path, key, v *yaml.Node) {
		f := m.Fields().ByJSONName(key.Value)
		if f == nil {
			f = m.Fields().ByTextName(key.Value)
		}
		switch {
		case f == nil:
			d.unknownField(p, key.Value, func(yield func(string) bool) {
				for i := range m.Fields().Len() {
					if !yield(m.Fields().Get(i).JSONName()) {
						return
					}
				}
			})
		case given[f.Number()]:
			d.errorf(p, "is written a second time, in its other spelling")
		default:
			given[f.Number()] = true
			d.checkField(p, v, f)
		}
	})
}

func (d *document) checkField(p path, n *yaml.Node, f protoreflect.FieldDescriptor) {
	switch {
	case isNull(n):
	case f.IsMap():
		d.eachEntry(p, n, func(p path, key, v *yaml.Node) {
			if f.MapKey().Kind() != protoreflect.StringKind {
				d.checkScalar(p, &yaml.Node{Kind: yaml.ScalarNode, Tag: intTag(key.Value), Value: key.Value, Line: key.Line}, goKind(f.MapKey().Kind()))
			}
			d.checkSingular(p, v, f.MapValue())
		})
	case f.IsList():
		d.eachItem(p, n, func(p path, v *yaml.Node) {
			if isNull(v) {
				d.want(p, v, "a value")
				return
			}
			d.checkSingular(p, v, f)
		})
	default:
		d.checkSingular(p, n, f)
	}
}

func (d *document) checkSingular(p path, n *yaml.Node, f protoreflect.FieldDescriptor) {
	switch f.Kind() {
	case protoreflect.MessageKind, protoreflect.GroupKind:
		d.checkMessage(p, n, f.Message())
	case protoreflect.EnumKind:
		if n.Kind != yaml.ScalarNode || f.Enum().Values().ByName(protoreflect.Name(n.Value)) == nil || n.Tag != "!!str" {
			var names []string
			for i := range f.Enum().Values().Len() {
				names = append(names, string(f.Enum().Values().Get(i).Name()))
			}
			slices.Sort(names)
			d.errorf(p, "must be one of %s", strings.Join(names, ", "))
		}
	case protoreflect.BytesKind:
		d.checkScalar(p, n, reflect.String)
	default:
		d.checkScalar(p, n, goKind(f.Kind()))
	}
}

func goKind(k protoreflect.Kind) reflect.Kind {
	switch k {
	case protoreflect.BoolKind:
		return reflect.Bool
	case protoreflect.StringKind:
		return reflect.String
	case protoreflect.FloatKind, protoreflect.DoubleKind:
		return reflect.Float64
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return reflect.Uint32
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return reflect.Uint64
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return reflect.Int32
	}
	return reflect.Int64
}

// intTag is the tag of a mapping's key that should be a whole number: quoted or
// not, JSON knows only text there.
func intTag(s string) string {
	if s != "" && strings.Trim(s, "0123456789") == "" {
		return "!!int"
	}
	return "!!str"
}
