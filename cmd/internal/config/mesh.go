package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"gopkg.in/yaml.v3"
)

// maxMeshFile bounds what is read of the mesh configuration, in bytes.
const maxMeshFile = 1 << 20

// proxyConfig is the part of Istio's ProxyConfig that concerns us. Other
// fields belong to Envoy and are passed over.
type proxyConfig struct {
	DiscoveryAddress *string           `yaml:"discoveryAddress"`
	ProxyAdminPort   *uint16           `yaml:"proxyAdminPort"`
	StatsPort        *uint16           `yaml:"statsPort"`
	Concurrency      *int              `yaml:"concurrency"`
	ProxyMetadata    map[string]string `yaml:"proxyMetadata"`
}

// readMesh reads the mesh configuration file. A missing file says nothing.
func readMesh(path string) (proxyConfig, error) {
	var mesh struct {
		DefaultConfig proxyConfig `yaml:"defaultConfig"`
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return proxyConfig{}, nil
	}
	if err == nil && info.Size() > maxMeshFile {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxMeshFile)
	}
	if err != nil {
		return proxyConfig{}, fmt.Errorf("config: mesh configuration: %w", err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return proxyConfig{}, fmt.Errorf("config: mesh configuration: %w", err)
	}
	if err := yaml.Unmarshal(text, &mesh); err != nil {
		return proxyConfig{}, fmt.Errorf("config: mesh configuration %s: %w", path, err)
	}
	return mesh.DefaultConfig, nil
}

// merge lays over on top of p: scalars replace, metadata adds up.
func (p *proxyConfig) merge(over proxyConfig) {
	replace(&p.DiscoveryAddress, over.DiscoveryAddress)
	replace(&p.ProxyAdminPort, over.ProxyAdminPort)
	replace(&p.StatsPort, over.StatsPort)
	replace(&p.Concurrency, over.Concurrency)
	for k, v := range over.ProxyMetadata {
		if p.ProxyMetadata == nil {
			p.ProxyMetadata = map[string]string{}
		}
		p.ProxyMetadata[k] = v
	}
}

func replace[T any](field **T, over *T) {
	if over != nil {
		*field = over
	}
}

// metadata is the merged metadata with ztunnel's names: without the prefix.
func (p *proxyConfig) metadata() map[string]string {
	m := make(map[string]string, len(p.ProxyMetadata))
	for k, v := range p.ProxyMetadata {
		m[strings.TrimPrefix(k, metaPrefix)] = v
	}
	return m
}
