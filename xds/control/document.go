package control

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"
)

// Bounds of one directory. A user's YAML is no enemy, but a runaway generator is.
const (
	maxFiles         = 10_000
	maxFileBytes     = 16 << 20
	maxTotalBytes    = 256 << 20
	maxDocumentNodes = 500_000 // after aliases are expanded
	maxDepth         = 200
	maxProblems      = 1_000
)

// path names a field inside a document: string keys and int indexes.
type path []any

// of returns p with more steps, sharing nothing with p.
func (p path) of(steps ...any) path { return append(p[:len(p):len(p)], steps...) }

// String is as in spec.ports[0].port and metadata.labels[istio.io/rev].
func (p path) String() string {
	var b strings.Builder
	for i, step := range p {
		switch s := step.(type) {
		case int:
			fmt.Fprintf(&b, "[%d]", s)
		case string:
			switch {
			case strings.ContainsAny(s, "./[] "):
				b.WriteString("[" + s + "]")
			case i > 0:
				b.WriteString("." + s)
			default:
				b.WriteString(s)
			}
		}
	}
	return b.String()
}

// problems collects what is wrong with one directory.
type problems struct{ list []Problem }

func (ps *problems) add(p Problem) {
	switch len(ps.list) {
	case maxProblems:
		ps.list = append(ps.list, Problem{File: p.File, Text: "more problems than are listed", Warning: p.Warning})
	case maxProblems + 1:
		// As bad as the worst of those that are not listed.
		last := &ps.list[maxProblems]
		last.Warning = last.Warning && p.Warning
	default:
		ps.list = append(ps.list, p)
	}
}

func (ps *problems) fatal() bool {
	for _, p := range ps.list {
		if !p.Warning {
			return true
		}
	}
	return false
}

// document is one YAML document with its places.
type document struct {
	file string
	root *yaml.Node
	ps   *problems
}

// line is where the field stands, or the nearest one around it that exists.
func (d *document) line(p path) int {
	n := d.root
	line := n.Line
	for _, step := range p {
		next := (*yaml.Node)(nil)
		switch s := step.(type) {
		case int:
			if n.Kind == yaml.SequenceNode && s >= 0 && s < len(n.Content) {
				next, line = n.Content[s], n.Content[s].Line
			}
		case string:
			if key, value := lookup(n, s); value != nil {
				next, line = value, key.Line
			}
		}
		if next == nil {
			return line
		}
		n = next
	}
	return line
}

// find returns the node at p, nil when there is none.
func (d *document) find(p path) *yaml.Node {
	n := d.root
	for _, step := range p {
		next := (*yaml.Node)(nil)
		switch s := step.(type) {
		case int:
			if n.Kind == yaml.SequenceNode && s >= 0 && s < len(n.Content) {
				next = n.Content[s]
			}
		case string:
			_, next = lookup(n, s)
		}
		if n = next; n == nil {
			return nil
		}
	}
	return n
}

func (d *document) errorf(p path, format string, args ...any) {
	d.ps.add(Problem{File: d.file, Line: d.line(p), Field: p.String(), Text: fmt.Sprintf(format, args...)})
}

func (d *document) warnf(p path, format string, args ...any) {
	d.ps.add(Problem{File: d.file, Line: d.line(p), Field: p.String(), Text: fmt.Sprintf(format, args...), Warning: true})
}

// lookup returns the key and value nodes of a mapping's entry.
func lookup(n *yaml.Node, name string) (key, value *yaml.Node) {
	if n.Kind != yaml.MappingNode {
		return nil, nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == name {
			return n.Content[i], n.Content[i+1]
		}
	}
	return nil, nil
}

// text is the string value of a mapping's entry, empty if there is none.
func text(n *yaml.Node, name string) string {
	if _, v := lookup(n, name); v != nil && v.Kind == yaml.ScalarNode && isString(v) {
		return v.Value
	}
	return ""
}

// parseFile splits a file into documents. Aliases and merge keys are expanded,
// so that what follows sees a plain tree.
func parseFile(file string, data []byte, ps *problems) (docs []*document) {
	// yaml.v3 is a port of a C parser; what it panics on is a broken file.
	defer func() {
		if r := recover(); r != nil {
			ps.add(Problem{File: file, Text: fmt.Sprintf("cannot be parsed: %v", r)})
		}
	}()
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var doc yaml.Node
		err := dec.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return docs
		}
		if err != nil {
			line, text := yamlError(err)
			ps.add(Problem{File: file, Line: line, Text: text})
			return docs
		}
		if len(doc.Content) == 0 {
			continue
		}
		f := flattener{budget: maxDocumentNodes}
		root, err := f.flatten(doc.Content[0], 0)
		if err != nil {
			ps.add(Problem{File: file, Line: f.line, Text: err.Error()})
			continue
		}
		if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
			continue
		}
		docs = append(docs, &document{file: file, root: root, ps: ps})
	}
}

// yamlError takes the line out of a parser's message.
func yamlError(err error) (line int, text string) {
	text = strings.TrimPrefix(err.Error(), "yaml: ")
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if n, msg, ok := strings.Cut(rest, ": "); ok {
			if line, err := strconv.Atoi(n); err == nil {
				return line, msg
			}
		}
	}
	return 0, text
}

// flattener copies a tree with aliases and merge keys replaced by what they mean.
type flattener struct {
	budget int
	line   int // of the latest node, for errors
}

func (f *flattener) flatten(n *yaml.Node, depth int) (*yaml.Node, error) {
	f.line = n.Line
	if f.budget--; f.budget < 0 {
		return nil, errors.New("the document is too large, or its aliases make it so")
	}
	if depth > maxDepth {
		return nil, fmt.Errorf("nested deeper than %d levels", maxDepth)
	}
	switch n.Kind {
	case yaml.AliasNode:
		if n.Alias == nil {
			return nil, errors.New("an alias without an anchor")
		}
		return f.flatten(n.Alias, depth+1)
	case yaml.MappingNode:
		return f.mapping(n, depth)
	}
	out := *n
	out.Content, out.Alias, out.Anchor = nil, nil, ""
	for _, c := range n.Content {
		child, err := f.flatten(c, depth+1)
		if err != nil {
			return nil, err
		}
		out.Content = append(out.Content, child)
	}
	return &out, nil
}

// mapping flattens a mapping. Merged entries come last and never win over
// written ones; a key written twice stays twice, for the checker to find.
func (f *flattener) mapping(n *yaml.Node, depth int) (*yaml.Node, error) {
	out := *n
	out.Content, out.Anchor = nil, ""
	var merges []*yaml.Node
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, err := f.flatten(n.Content[i], depth+1)
		if err != nil {
			return nil, err
		}
		if key.Kind != yaml.ScalarNode {
			return nil, errors.New("a key is not a scalar")
		}
		value, err := f.flatten(n.Content[i+1], depth+1)
		if err != nil {
			return nil, err
		}
		if key.Tag == "!!merge" {
			merges = append(merges, value)
			continue
		}
		out.Content = append(out.Content, key, value)
	}
	for _, m := range merges {
		parts := []*yaml.Node{m}
		if m.Kind == yaml.SequenceNode {
			parts = m.Content
		}
		for _, part := range parts {
			if part.Kind != yaml.MappingNode {
				f.line = part.Line
				return nil, errors.New("a merge key needs a mapping")
			}
			for i := 0; i+1 < len(part.Content); i += 2 {
				if have, _ := lookup(&out, part.Content[i].Value); have == nil {
					out.Content = append(out.Content, part.Content[i], part.Content[i+1])
				}
			}
		}
	}
	return &out, nil
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

// isString says whether a scalar is text. Dates are: Kubernetes knows them as strings.
func isString(n *yaml.Node) bool { return n.Tag == "!!str" || n.Tag == "!!timestamp" }

// plain turns a flattened node into what encoding/json understands.
func plain(n *yaml.Node) (any, error) {
	switch n.Kind {
	case yaml.MappingNode:
		m := make(map[string]any, len(n.Content)/2)
		for i := 0; i+1 < len(n.Content); i += 2 {
			v, err := plain(n.Content[i+1])
			if err != nil {
				return nil, err
			}
			m[n.Content[i].Value] = v
		}
		return m, nil
	case yaml.SequenceNode:
		s := make([]any, 0, len(n.Content))
		for _, c := range n.Content {
			v, err := plain(c)
			if err != nil {
				return nil, err
			}
			s = append(s, v)
		}
		return s, nil
	case yaml.ScalarNode:
		if isString(n) {
			return n.Value, nil
		}
		var v any
		if err := n.Decode(&v); err != nil {
			return nil, err
		}
		return v, nil
	}
	return nil, fmt.Errorf("line %d: not a value", n.Line)
}

func toJSON(n *yaml.Node) ([]byte, error) {
	v, err := plain(n)
	if err != nil {
		return nil, err
	}
	return json.Marshal(v)
}
