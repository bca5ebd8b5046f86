package marks

import (
	"fmt"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/yaml"
)

const (
	// maxSelectorText bounds what ParseSelectors reads, in bytes.
	maxSelectorText = 64 << 10
	// ModeLabel enrols pods and namespaces, or leaves them out.
	ModeLabel = "istio.io/dataplane-mode"
)

// A Selector takes pods into the mesh: those that match both halves. It is
// immutable.
type Selector struct {
	pod, namespace labels.Selector
}

// selectorText is an entry of AMBIENT_ENABLEMENT_SELECTOR.
type selectorText struct {
	PodSelector       metav1.LabelSelector `json:"podSelector,omitempty"`
	NamespaceSelector metav1.LabelSelector `json:"namespaceSelector,omitempty"`
}

// DefaultSelectors take the pods labelled istio.io/dataplane-mode=ambient, and
// those of namespaces labelled so that are not labelled none themselves.
func DefaultSelectors() []Selector {
	ambient := labels.SelectorFromSet(labels.Set{ModeLabel: "ambient"})
	notNone, err := metav1.LabelSelectorAsSelector(&metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{
		{Key: ModeLabel, Operator: metav1.LabelSelectorOpNotIn, Values: []string{"none"}},
	}})
	if err != nil {
		panic(err) // A constant.
	}
	return []Selector{{pod: ambient, namespace: labels.Everything()}, {pod: notNone, namespace: ambient}}
}

// ParseSelectors reads a YAML list of {podSelector, namespaceSelector}, each a
// Kubernetes LabelSelector; one that is left out matches everything. An empty
// text yields nil, which is the default; an empty list takes no pod.
func ParseSelectors(text string) ([]Selector, error) {
	if strings.TrimSpace(text) == "" {
		return nil, nil
	}
	if len(text) > maxSelectorText {
		return nil, fmt.Errorf("marks: enablement selectors: %d bytes are more than %d", len(text), maxSelectorText)
	}
	var entries []*selectorText
	if err := yaml.UnmarshalStrict([]byte(text), &entries); err != nil {
		return nil, fmt.Errorf("marks: enablement selectors: %w", err)
	}
	out := make([]Selector, 0, len(entries))
	for i, e := range entries {
		if e == nil {
			return nil, fmt.Errorf("marks: enablement selectors: entry %d is null", i)
		}
		pod, err := metav1.LabelSelectorAsSelector(&e.PodSelector)
		if err != nil {
			return nil, fmt.Errorf("marks: enablement selectors: entry %d: podSelector: %w", i, err)
		}
		namespace, err := metav1.LabelSelectorAsSelector(&e.NamespaceSelector)
		if err != nil {
			return nil, fmt.Errorf("marks: enablement selectors: entry %d: namespaceSelector: %w", i, err)
		}
		out = append(out, Selector{pod: pod, namespace: namespace})
	}
	return out, nil
}

// Matches says whether s takes a pod with these labels in a namespace with those.
func (s Selector) Matches(pod, namespace map[string]string) bool {
	return s.pod.Matches(labels.Set(pod)) && s.namespace.Matches(labels.Set(namespace))
}

// MatchesNamespace says whether s takes pods of a namespace with these labels.
// every: it takes those of every namespace.
func (s Selector) MatchesNamespace(namespace map[string]string) (match, every bool) {
	return s.namespace.Matches(labels.Set(namespace)), s.namespace.Empty()
}
