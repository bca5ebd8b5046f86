package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"reflect"
	"slices"

	"github.com/containernetworking/cni/libcni"

	"github.com/ztun/ztun/cmd/internal/cni/wire"
)

// A list is the text of a network configuration list, and where its plugins
// stand in it. Editing cuts and pastes, so that what others wrote stays as it
// is to the byte, and leaves as it came.
type list struct {
	text    []byte
	open    int // Just behind the bracket that begins "plugins".
	plugins []element
}

// element is one plugin: text[start:end].
type element struct {
	start, end int
	kind       string // Its "type".
}

// parseList reads a configuration list by libcni's rules.
func parseList(text []byte) (*list, error) {
	if err := checkJSON(text); err != nil {
		return nil, err
	}
	if _, err := libcni.NetworkConfFromBytes(text); err != nil {
		return nil, err
	}
	l := &list{text: text}
	dec := json.NewDecoder(bytes.NewReader(text))
	if _, err := dec.Token(); err != nil {
		return nil, err
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, err
		}
		if key != "plugins" {
			var skipped json.RawMessage
			if err := dec.Decode(&skipped); err != nil {
				return nil, err
			}
			continue
		}
		if l.plugins != nil {
			return nil, errors.New(`"plugins" is there twice`)
		}
		if err := l.locate(dec); err != nil {
			return nil, err
		}
	}
	if len(l.plugins) == 0 {
		return nil, errors.New("no plugins in the list")
	}
	return l, nil
}

// locate notes where the elements of the array are that dec stands before.
func (l *list) locate(dec *json.Decoder) error {
	if t, err := dec.Token(); err != nil || t != json.Delim('[') {
		return errors.Join(errors.New(`"plugins" is not an array`), err)
	}
	l.open = int(dec.InputOffset())
	for dec.More() {
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return err
		}
		end := int(dec.InputOffset())
		var head struct {
			Type string `json:"type"`
		}
		if err := json.Unmarshal(raw, &head); err != nil {
			return err
		}
		l.plugins = append(l.plugins, element{start: end - len(raw), end: end, kind: head.Type})
	}
	_, err := dec.Token()
	return err
}

// checkJSON says at which place text is not one JSON value.
func checkJSON(text []byte) error {
	var v json.RawMessage
	err := json.Unmarshal(text, &v)
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		before := text[:max(min(int(syntax.Offset), len(text))-1, 0)]
		line := 1 + bytes.Count(before, []byte("\n"))
		column := len(before) - bytes.LastIndexByte(before, '\n')
		return fmt.Errorf("not JSON at line %d, column %d: %w", line, column, err)
	}
	return err
}

// has reports whether a plugin of that type is in the list.
func (l *list) has(kind string) bool {
	return slices.ContainsFunc(l.plugins, func(e element) bool { return e.kind == kind })
}

// own returns our entry; nil: there is none, or more than one, or it cannot be
// read.
func (l *list) own() *wire.Conf {
	var found *wire.Conf
	for _, e := range l.plugins {
		if e.kind != wire.PluginType {
			continue
		}
		c, err := parseOwn(l.text[e.start:e.end])
		if err != nil || found != nil {
			return nil
		}
		found = c
	}
	return found
}

func parseOwn(text []byte) (*wire.Conf, error) {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	c := new(wire.Conf)
	if err := dec.Decode(c); err != nil {
		return nil, err
	}
	return c, nil
}

// without returns the text without our entries; nil: nothing else is in it.
func (l *list) without() []byte {
	var cuts [][2]int
	kept := -1 // The last one that stays.
	for i, e := range l.plugins {
		switch {
		case e.kind != wire.PluginType:
			if kept < 0 && i > 0 {
				cuts = append(cuts, [2]int{l.plugins[0].start, e.start})
			}
			kept = i
		case kept >= 0:
			cuts = append(cuts, [2]int{l.plugins[i-1].end, e.end})
		}
	}
	if kept < 0 {
		return nil
	}
	var out []byte
	at := 0
	for _, c := range cuts {
		out = append(out, l.text[at:c[0]]...)
		at = c[1]
	}
	return append(out, l.text[at:]...)
}

// with returns the text with our entry as the last plugin and nowhere else.
func (l *list) with(conf wire.Conf) ([]byte, error) {
	if last := l.plugins[len(l.plugins)-1]; last.kind == wire.PluginType {
		// Equal in whatever form somebody may have written it again.
		if c := l.own(); c != nil && reflect.DeepEqual(*c, conf) {
			return l.text, nil
		}
	}
	rest := l.without()
	if rest == nil {
		return nil, fmt.Errorf("no plugin but %s in the list", wire.PluginType)
	}
	l, err := parseList(rest)
	if err != nil {
		return nil, err
	}
	entry, err := json.Marshal(conf)
	if err != nil {
		return nil, err
	}
	last := l.plugins[len(l.plugins)-1]
	out := slices.Clone(l.text[:last.end])
	out = append(out, ',')
	out = append(out, l.indent(last)...)
	out = append(out, entry...)
	return append(out, l.text[last.end:]...), nil
}

// indent is the white space before e.
func (l *list) indent(e element) []byte {
	before := l.text[l.open:e.start]
	return before[len(bytes.TrimRight(before, " \t\r\n")):]
}

// wrap makes a list of a single configuration. The network keeps its name: IPAM
// plugins remember addresses under it.
func wrap(text []byte) ([]byte, error) {
	if err := checkJSON(text); err != nil {
		return nil, err
	}
	conf, err := libcni.NetworkPluginConfFromBytes(text)
	if err != nil {
		return nil, err
	}
	name, version := conf.Network.Name, conf.Network.CNIVersion
	if name == "" {
		name = "k8s-pod-network"
	}
	if version == "" {
		version = "0.3.1"
	}
	head, err := json.Marshal(struct {
		CNIVersion string `json:"cniVersion"`
		Name       string `json:"name"`
	}{version, name})
	if err != nil {
		return nil, err
	}
	out := append(bytes.TrimSuffix(head, []byte("}")), `,"plugins":[`...)
	out = append(out, text...)
	return append(out, "]}\n"...), nil
}

// unwrap undoes wrap. ok is false if somebody made more of the list since.
func (l *list) unwrap() (name string, text []byte, ok bool) {
	c := l.own()
	if c == nil || !isConfName(c.WrappedFrom) || len(l.plugins) != 2 {
		return "", nil, false
	}
	rest := l.without()
	l, err := parseList(rest)
	if err != nil {
		return "", nil, false
	}
	tail := bytes.LastIndexByte(rest, ']')
	return c.WrappedFrom, rest[l.open:tail], true
}

// isConfName says whether name is a file's name without a folder, of a single
// configuration.
func isConfName(name string) bool {
	ext := filepath.Ext(name)
	return name == filepath.Base(name) && (ext == ".conf" || ext == ".json") && len(name) > len(ext)
}

// readAll reads at most limit bytes; more is an error.
func readAll(r io.Reader, limit int64) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = fmt.Errorf("more than %d bytes", limit)
	}
	return text, err
}
