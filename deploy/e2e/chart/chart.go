// Package chart renders ztun's Helm chart as `helm install` would, so that tests
// install what users install.
//
//	objects, err := chart.Render("../chart", chart.Options{Values: map[string]any{"image": "localhost/ztun:e2e"}})
package chart

import (
	"fmt"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	releaseutil "helm.sh/helm/v4/pkg/release/v1/util"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// Options are what a user says to `helm install`. The zero value of a field is
// the default named on it.
type Options struct {
	Release   string         // ztun
	Namespace string         // istio-system
	Kube      string         // The cluster's version. v1.36.3
	Values    map[string]any // Over the chart's own, and checked by its schema.
}

// Manifest is the text of one object.
type Manifest struct {
	Kind, Name string
	YAML       string
}

// Manifests renders the chart in directory dir, in the order in which Helm
// creates the objects.
func Manifests(dir string, o Options) ([]Manifest, error) {
	files, err := render(dir, o)
	if err != nil {
		return nil, err
	}
	for name := range files {
		if strings.HasSuffix(name, notes) {
			delete(files, name)
		}
	}
	_, sorted, err := releaseutil.SortManifests(files, nil, releaseutil.InstallOrder)
	if err != nil {
		return nil, fmt.Errorf("chart: %w", err)
	}
	var out []Manifest
	for _, m := range sorted {
		if m.Head.Metadata == nil {
			return nil, fmt.Errorf("chart: %s: an object without metadata", m.Name)
		}
		out = append(out, Manifest{Kind: m.Head.Kind, Name: m.Head.Metadata.Name, YAML: m.Content})
	}
	return out, nil
}

// notes is what Helm prints after an installation, and no object.
const notes = "templates/NOTES.txt"

// render makes every template's text, by path.
func render(dir string, o Options) (map[string]string, error) {
	fill(&o.Release, "ztun")
	fill(&o.Namespace, "istio-system")
	fill(&o.Kube, "v1.36.3")
	c, err := loader.LoadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("chart: load %s: %w", dir, err)
	}
	kube, err := common.ParseKubeVersion(o.Kube)
	if err != nil {
		return nil, fmt.Errorf("chart: Kubernetes version %q: %w", o.Kube, err)
	}
	caps := common.DefaultCapabilities.Copy()
	caps.KubeVersion = *kube
	release := common.ReleaseOptions{Name: o.Release, Namespace: o.Namespace, Revision: 1, IsInstall: true}
	values, err := util.ToRenderValues(c, o.Values, release, caps)
	if err != nil {
		return nil, fmt.Errorf("chart: %w", err)
	}
	files, err := engine.Render(c, values)
	if err != nil {
		return nil, fmt.Errorf("chart: %w", err)
	}
	return files, nil
}

// Render is Manifests as objects.
func Render(dir string, o Options) ([]*unstructured.Unstructured, error) {
	manifests, err := Manifests(dir, o)
	if err != nil {
		return nil, err
	}
	var objects []*unstructured.Unstructured
	for _, m := range manifests {
		u := &unstructured.Unstructured{}
		// By way of JSON, as the API reads it: no key twice, integers stay integers.
		text, err := yaml.YAMLToJSONStrict([]byte(m.YAML))
		if err == nil {
			err = u.UnmarshalJSON(text)
		}
		if err != nil {
			return nil, fmt.Errorf("chart: %s %s: %w", m.Kind, m.Name, err)
		}
		objects = append(objects, u)
	}
	return slices.Clip(objects), nil
}

func fill(field *string, value string) {
	if *field == "" {
		*field = value
	}
}
